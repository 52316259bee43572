//! Appending payloads, trimming, paging, and following without gaps.

use serde_json::value::RawValue;
use sessiond::domain::envelope::{self, Content, NewPayload};
use sessiond::domain::record::{RecordAnchor, RecordPage, RecordPageRequest};
use sessiond::domain::{Follow, Record, RecordBatch, SeqNum};

use super::*;

fn text<'a>(text: &'a str, part_id: Option<&'a str>) -> NewPayload<'a> {
    NewPayload { content: Content::Text(text), part_id }
}

fn places(records: &[Record]) -> Vec<SeqNum> {
    records.iter().map(|record| record.position.seq_num).collect()
}

impl Core {
    /// Appends one record for each body to `.out`; `#` stands for a command.
    async fn fill(&self, bodies: &[&str]) {
        for body in bodies {
            let record = match *body {
                "#" => Command::Fence(String::new()).into_record(),
                body => NewRecord::data(body.to_owned()),
            };
            self.append(&self.root, &self.out, record).await.expect("appended");
        }
    }

    async fn page(&self, size: usize, anchor: RecordAnchor) -> RecordPage {
        let request = RecordPageRequest::new(size, anchor).expect("a size in range");
        self.sessions.page(&self.root, &self.address, &self.out, request).await.expect("a page")
    }

    async fn trim(&self, before: SeqNum) -> Result<(), Error> {
        self.sessions.trim(&self.root, &self.address, &self.out, before).await.map(drop)
    }

    async fn follow(&self, start: ReadStart) -> Follow {
        let options = FollowOptions { start, peek_settled: false, require_complete: true };
        self.sessions
            .follow(&self.root, &self.address, &self.out, options, &ample_budget())
            .await
            .expect("a follower")
    }
}

async fn event(follow: &mut Follow) -> Result<FollowEvent, Error> {
    let event = follow.next(START.plus(Duration::from_secs(3600)));
    tokio::time::timeout(Duration::from_secs(20), event).await.expect("an event before the test gives up")
}

async fn batch(follow: &mut Follow) -> Arc<RecordBatch> {
    match event(follow).await {
        Ok(FollowEvent::Batch(batch)) => batch.batch().clone(),
        other => panic!("expected a batch, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_payloads_is_stored_as_text_and_as_values_and_comes_back() {
    let core = Core::open().await;
    let value: Box<RawValue> = serde_json::from_str(r#"{"n": 1.50}"#).expect("JSON");
    let payloads =
        [text("{\"n\":1}", Some("a")), NewPayload { content: Content::Json(&value), part_id: None }];
    let append = core.sessions.append_payloads(&core.root, &core.address, &core.out, &payloads, Some(0));
    let appended = append.await.expect("appended");
    let records = core.sessions.appended(&appended).await.expect("read back");
    assert_eq!((places(&records), appended.ack.tail.seq_num), (vec![0, 1], 2));
    let envelopes: Vec<_> = records.iter().map(|record| envelope::unwrap(record).expect("one")).collect();
    assert_eq!((envelopes[0].data.get(), envelopes[0].id.as_ref()), (r#""{\"n\":1}""#, "a"));
    assert_eq!(envelopes[1].data.get(), r#"{"n": 1.50}"#);
    let late =
        core.sessions.append_payloads(&core.root, &core.address, &core.out, &payloads[1..], Some(0)).await;
    assert!(matches!(late, Err(Error::SeqNumMismatch { tail: 2 })), "{late:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_append_answers_the_original_records_to_who_may_only_write() {
    let core = Core::open().await;
    let writer = core.public(&["write:sessions:s"]);
    let input = ChannelAddress::main(Direction::In);
    for (id, pause) in [("a", 0), ("b", 1), ("c", 2)] {
        core.clock.advance(Duration::from_secs(pause));
        let append = [text(id, Some(id))];
        core.sessions.append_payloads(&writer, &core.address, &input, &append, None).await.expect("appended");
    }
    core.clock.advance(Duration::from_secs(10));
    let again = ["c", "a", "b"].map(|id| text(id, Some(id)));
    let again = core.sessions.append_payloads(&writer, &core.address, &input, &again, None).await;
    let again = again.expect("found");
    assert!(again.ack.repeated);
    let records = core.sessions.appended(&again).await.expect("read back");
    assert_eq!(places(&records), [2, 0, 1]);
    let seconds: Vec<_> =
        records.iter().map(|record| record.position.timestamp.seconds() - START.seconds()).collect();
    assert_eq!(seconds, [3, 0, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_trimmed_since_are_left_out_of_an_append_and_no_other_takes_their_place() {
    let core = Core::open().await;
    let payloads = ["a", "b", "c"].map(|id| text(id, Some(id)));
    let append = || core.sessions.append_payloads(&core.root, &core.address, &core.out, &payloads, None);
    append().await.expect("appended");
    core.fill(&["d"]).await;
    let again = append().await.expect("found");
    for (before, left) in [(0, vec![0, 1, 2]), (1, vec![1, 2]), (2, vec![2]), (4, vec![])] {
        core.trim(before).await.expect("trimmed");
        let records = core.sessions.appended(&again).await.expect("read back");
        assert_eq!(places(&records), left, "trimmed before {before}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_is_for_secret_keys_of_open_sessions_and_ends_at_the_tail() {
    let core = Core::open().await;
    core.fill(&["a", "b"]).await;
    let public = core.public(&["write:sessions:s", "admin"]);
    let refused = core.sessions.trim(&public, &core.address, &core.out, 1).await;
    assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
    let refused = core.trim(3).await;
    assert!(matches!(&refused, Err(Error::Invalid(faults)) if faults[0].field == "before"), "{refused:?}");
    core.trim(2).await.expect("trimmed");
    let bounds = core.sessions.bounds(&core.root, &core.address, &core.out).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail.seq_num), (2, 3));
    core.sessions.close(&core.root, &core.address, None, None).await.expect("closed");
    let refused = core.trim(3).await;
    assert!(matches!(refused, Err(Error::Closed { .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_either_way_meet_every_record_once_and_no_command() {
    let core = Core::open().await;
    core.fill(&["#", "a", "b", "#", "#", "#", "c", "d", "#", "e", "#", "#"]).await;
    let visible = [1, 2, 6, 7, 9];
    for size in [1, 2, 3, 5, 100] {
        let (mut forward, mut cursor) = (Vec::new(), None);
        loop {
            let page = core.page(size, RecordAnchor::After(cursor)).await;
            forward.extend(places(&page.records));
            cursor = forward.last().copied();
            assert_eq!(page.has_next, forward.len() < visible.len(), "size {size} after {forward:?}");
            if !page.has_next {
                break;
            }
            assert_eq!(page.records.len(), size);
        }
        assert_eq!(forward, visible, "size {size}");
        let (mut backward, mut cursor) = (Vec::new(), None);
        loop {
            let page = core.page(size, RecordAnchor::Before(cursor)).await;
            backward.splice(..0, places(&page.records));
            cursor = backward.first().copied();
            assert_eq!(page.has_previous, backward.len() < visible.len(), "size {size} before {backward:?}");
            if !page.has_previous {
                break;
            }
            assert_eq!(page.records.len(), size);
        }
        assert_eq!(backward, visible, "size {size}");
    }
    for anchor in [RecordAnchor::After(Some(11)), RecordAnchor::Before(Some(0))] {
        assert!(core.page(5, anchor).await.records.is_empty(), "{anchor:?}");
    }
    for size in [0, 101] {
        assert!(matches!(RecordPageRequest::new(size, RecordAnchor::After(None)), Err(Error::Invalid(_))));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_large_records_is_short_and_says_that_there_are_more() {
    let core = Core::open().await;
    let large = "x".repeat(1_000_000);
    core.fill(&[&large, &large, &large, "small", &large, "#", &large, &large]).await;
    let page = core.page(100, RecordAnchor::After(None)).await;
    assert_eq!((places(&page.records), page.has_next), (vec![0, 1, 2, 3, 4], true));
    let page = core.page(100, RecordAnchor::After(Some(4))).await;
    assert_eq!((places(&page.records), page.has_next), (vec![6, 7], false));
    let page = core.page(100, RecordAnchor::Before(None)).await;
    assert_eq!((places(&page.records), page.has_previous), (vec![2, 3, 4, 6, 7], true));
    let page = core.page(100, RecordAnchor::Before(Some(2))).await;
    assert_eq!((places(&page.records), page.has_previous), (vec![0, 1], false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_after_a_trimmed_record_begins_at_the_first_that_remains() {
    let core = Core::open().await;
    core.fill(&["a", "b", "c", "d"]).await;
    core.trim(2).await.expect("trimmed");
    let page = core.page(1, RecordAnchor::After(Some(0))).await;
    assert_eq!((places(&page.records), page.has_next, page.has_previous), (vec![2], true, false));
    let page = core.page(5, RecordAnchor::Before(None)).await;
    assert_eq!((places(&page.records), page.has_next, page.has_previous), (vec![2, 3], false, false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_must_miss_nothing_is_told_of_a_trimmed_start() {
    let core = Core::open().await;
    core.fill(&["a", "b", "c"]).await;
    core.trim(2).await.expect("trimmed");
    let refused = event(&mut core.follow(ReadStart::SeqNum(1)).await).await;
    assert!(matches!(refused, Err(Error::Trimmed { earliest: 2 })), "{refused:?}");
    let fits = batch(&mut core.follow(ReadStart::SeqNum(2)).await).await;
    assert_eq!(places(&fits.records), [2, 3]);
    core.trim(4).await.expect("trimmed");
    core.trim(5).await.expect("trimmed");
    let refused = event(&mut core.follow(ReadStart::SeqNum(4)).await).await;
    assert!(matches!(refused, Err(Error::Trimmed { earliest: 5 })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_beyond_the_tail_is_refused_and_the_last_record_is_none() {
    let core = Core::open().await;
    let refused = event(&mut core.follow(ReadStart::SeqNum(1)).await).await;
    assert!(matches!(refused, Err(Error::CursorAhead { tail: 0 })), "an empty channel: {refused:?}");
    core.fill(&["a", "#"]).await;
    let mut at_tail = core.follow(ReadStart::SeqNum(2)).await;
    let caught_up = event(&mut at_tail).await;
    assert!(matches!(caught_up, Ok(FollowEvent::CaughtUp(tail)) if tail.seq_num == 2), "{caught_up:?}");
    let mut overtaken = core.follow(ReadStart::SeqNum(3)).await;
    core.fill(&["b", "c"]).await;
    assert_eq!(places(&batch(&mut at_tail).await.records)[0], 2);
    let refused = event(&mut overtaken).await;
    assert!(matches!(refused, Err(Error::CursorAhead { tail: 2 })), "where it would have begun: {refused:?}");
    for (cursor, fits) in [(3, true), (4, false), (SeqNum::MAX, false)] {
        let request = RecordPageRequest::new(5, RecordAnchor::After(Some(cursor))).expect("a size in range");
        match core.sessions.page(&core.root, &core.address, &core.out, request).await {
            Ok(page) => assert!(fits && page.records.is_empty(), "{cursor}: {page:?}"),
            Err(Error::CursorAhead { tail: 4 }) => assert!(!fits, "{cursor}"),
            Err(other) => panic!("{cursor}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_must_miss_nothing_is_told_when_a_trim_overtakes_it() {
    let core = Core::open().await;
    core.fill(&["a"]).await;
    // By number, and from now.
    let mut followers = Vec::new();
    for start in [ReadStart::SeqNum(1), ReadStart::TailOffset(0)] {
        let mut follow = core.follow(start).await;
        let caught_up = event(&mut follow).await;
        assert!(matches!(caught_up, Ok(FollowEvent::CaughtUp(tail)) if tail.seq_num == 1), "{caught_up:?}");
        followers.push(follow);
    }
    // More than the live window holds, so that the followers come back to the store.
    for _ in 0..100 {
        core.fill(&["b"]).await;
    }
    core.trim(50).await.expect("trimmed");
    for mut follow in followers {
        let refused = event(&mut follow).await;
        assert!(matches!(refused, Err(Error::Trimmed { earliest: 50 })), "{refused:?}");
    }
}
