use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A blob of version 2 with messages `m0`, `m1`, ...
fn lines(ids: &[String]) -> Vec<u8> {
    let mut blob =
        json!({"v": 2, "savedAt": 1, "lastOutEventId": "7", "state": {"secret": 1}}).to_string().into_bytes();
    // The writer's order of fields, which the reader goes by.
    blob.splice(0..1, *b"{\"v\":2,").for_each(drop);
    let mut blob = String::from_utf8(blob).expect("JSON").replacen(",\"v\":2", "", 1).into_bytes();
    blob.push(b'\n');
    let mut offsets = vec![blob.len()];
    for id in ids {
        let line = json!({"id": id, "final": true, "message": {"id": id, "text": "é"}}).to_string();
        blob.extend_from_slice(line.as_bytes());
        blob.push(b'\n');
        offsets.push(blob.len());
    }
    let footer = json!({"ids": ids, "offsets": offsets, "lastOutEventId": "7"}).to_string();
    blob.extend_from_slice(format!("{footer}\n#tt2:{:016}\n", footer.len()).as_bytes());
    blob
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("m{number}")).collect()
}

/// The page of a whole blob, and what it shows.
fn shown(blob: &[u8], query: &TranscriptQuery) -> Shown {
    Shown::of(page(blob, query), blob)
}

/// A page with its messages.
#[derive(Debug, PartialEq)]
struct Shown {
    ids: Vec<String>,
    cursors: TranscriptCursors,
    next_cursor: Option<String>,
}

impl Shown {
    fn of(page: Page, blob: &[u8]) -> Self {
        let base = usize::try_from(page.base).expect("inside");
        let messages = page.messages(&blob[base..]);
        assert_eq!(messages.len() as u64, page.length());
        let messages: Vec<serde_json::Value> =
            serde_json::from_slice(&[b"[", &messages[..], b"]"].concat()).expect("JSON");
        let id = |message: &serde_json::Value| message["id"].as_str().expect("an id").to_owned();
        let ids = messages.iter().map(id).collect();
        Self { ids, cursors: page.cursors, next_cursor: page.next_cursor }
    }
}

/// As the use case does it: the trailer, the index, the window.
fn by_index(blob: &[u8], query: &TranscriptQuery) -> Option<Shown> {
    let end = blob.len() - TRAILER - 1 - usize::try_from(footer_length(blob)?).ok()?;
    let window = window(&blob[end..blob.len() - TRAILER], end as u64, query)?;
    let at = |offset| usize::try_from(offset).expect("inside");
    let lines = &blob[at(window.range.start)..at(window.range.end)];
    Some(Shown::of(page_within(window, lines), blob))
}

fn query(limit: Option<usize>, before: Option<&str>) -> TranscriptQuery {
    TranscriptQuery { limit, before: before.map(str::to_owned) }
}

#[test]
fn every_version_gives_the_same_messages() {
    let message = |id: &str| json!({"id": id, "text": "é"});
    let one = json!({"version": 1, "messages": [message("m0"), message("m1")], "lastOutEventId": "7"});
    let entry = |id: &str| json!({"id": id, "final": false, "message": message(id)});
    let two =
        json!({"version": 2, "messages": [entry("m0"), entry("m1")], "state": {}, "lastOutEventId": "7"});
    for blob in [one.to_string().into_bytes(), two.to_string().into_bytes(), lines(&names(2))] {
        let transcript = shown(&blob, &TranscriptQuery::default());
        assert_eq!(transcript.ids, ["m0", "m1"]);
        assert_eq!(transcript.cursors.last_out_event_id.as_deref(), Some("7"));
        assert_eq!(transcript.cursors.last_in_event_id, None);
        assert_eq!(transcript.next_cursor, None);
    }
}

#[test]
fn what_cannot_be_read_is_left_out() {
    for blob in ["", "x", "[]", "null", r#"{"version":3,"messages":[]}"#, r#"{"v":2"#, r#"{"version":1}"#] {
        assert!(shown(blob.as_bytes(), &TranscriptQuery::default()).ids.is_empty(), "{blob}");
    }
    let broken = concat!(
        "{\"v\":2,\"state\":null}\n",
        "{\"id\":\"a\",\"final\":true,\"message\":{\"id\":\"a\"}}\n",
        "{\"id\":\"b\",\"final\":true,\"message\":{\"id\":\"other\"}}\n",
        "{\"id\":\"\",\"message\":{\"id\":\"\"}}\n",
        "[\"c\",{\"id\":\"c\"}]\n",
        "{\"id\":\"d\",\"message\":[\"d\"]}\n",
        "{\"id\":\"e\",\"mess\n",
        "{\"id\":\"f\",\"message\":{\"id\":\"f\"}}"
    );
    assert_eq!(shown(broken.as_bytes(), &TranscriptQuery::default()).ids, ["a", "f"]);
    let one = json!({"version": 1, "messages": [null, 1, {"id": 1}, {"id": ""}, {"id": "a"}, ["b"]]});
    assert_eq!(shown(one.to_string().as_bytes(), &TranscriptQuery::default()).ids, ["a"]);
}

#[test]
fn a_page_holds_the_newest_and_leads_to_older_ones() {
    let blob = lines(&names(5));
    for (limit, before, expected, next) in [
        (Some(2), None, vec!["m3", "m4"], Some("m3")),
        (Some(2), Some("m3"), vec!["m1", "m2"], Some("m1")),
        (Some(2), Some("m1"), vec!["m0"], None),
        (Some(5), None, vec!["m0", "m1", "m2", "m3", "m4"], None),
        (Some(0), Some("m2"), vec!["m0", "m1"], None),
        (None, Some("m0"), vec![], None),
        (Some(3), Some("gone"), vec![], None),
    ] {
        let query = query(limit, before);
        for page in [shown(&blob, &query), by_index(&blob, &query).expect("an index")] {
            assert_eq!(page.ids, expected, "{query:?}");
            assert_eq!(page.next_cursor.as_deref(), next, "{query:?}");
            assert_eq!(page.cursors.last_out_event_id.as_deref(), Some("7"));
        }
    }
}

#[test]
fn an_index_that_does_not_fit_is_none() {
    for (line, end) in [
        (r#"{"ids":["a"],"offsets":[0,5]}"#, 4),
        (r#"{"ids":["a"],"offsets":[5,5]}"#, 9),
        (r#"{"ids":["a"],"offsets":[5]}"#, 9),
        (r#"{"ids":["a"],"offsets":[-1,5]}"#, 9),
        (r#"{"ids":[1],"offsets":[1,5]}"#, 9),
        (r#"[["a"],[1,5]]"#, 9),
        ("", 9),
    ] {
        assert!(window(line.as_bytes(), end, &TranscriptQuery::default()).is_none(), "{line}");
    }
    for tail in ["", "#tt2:000000000000001\n", "#tt2:00000000000000x1\n", "#tt2:-000000000000001\n"] {
        assert_eq!(footer_length(tail.as_bytes()), None, "{tail}");
    }
}

#[test]
fn a_page_has_a_bound_of_its_own_and_leads_on() {
    let all = TranscriptQuery::default();
    let one = |ids: &[String]| {
        let messages: Vec<_> = ids.iter().map(|id| json!({"id": id})).collect();
        json!({"version": 1, "messages": messages}).to_string().into_bytes()
    };
    let names = names(PAGE_MESSAGES + 5);
    for blob in [one(&names), lines(&names)] {
        for query in [all.clone(), query(Some(PAGE_MESSAGES + 1), None)] {
            let page = shown(&blob, &query);
            assert_eq!((page.ids.len(), page.next_cursor.as_deref()), (PAGE_MESSAGES, Some("m5")));
        }
        assert_eq!(shown(&blob, &query(None, Some("m5"))).ids, names[..5]);
    }
    let page = by_index(&lines(&names), &all).expect("an index");
    assert_eq!((page.ids.len(), page.next_cursor.as_deref()), (PAGE_MESSAGES, Some("m5")));
    // Of messages of half a page it takes two at most, of larger ones one.
    for (size, at_once) in [(PAGE_BYTES / 2 - 100, 2), (PAGE_BYTES + 1, 1)] {
        let text = "x".repeat(usize::try_from(size).expect("fits"));
        let message = |id: &str| json!({"id": id, "text": text});
        let header = "{\"v\":2}\n";
        let line = |id: &str| format!("{}\n", json!({"id": id, "message": message(id)}));
        let blob = match at_once {
            1 => [header.to_owned(), line("a"), line("b"), line("c")].concat(),
            _ => json!({"version": 1, "messages": [message("a"), message("b"), message("c")]}).to_string(),
        };
        let page = shown(blob.as_bytes(), &query((at_once == 1).then_some(3), None));
        assert_eq!(page.ids, ["a", "b", "c"][3 - at_once..], "{size}");
        assert_eq!(page.next_cursor.as_deref(), Some(page.ids[0].as_str()));
        let offsets: Vec<_> = (0..4).map(|n| 8 + n * size).collect();
        let index = json!({"ids": ["a", "b", "c"], "offsets": offsets}).to_string();
        let window = window(index.as_bytes(), offsets[3], &all).expect("an index");
        assert_eq!(window.range, offsets[3 - at_once]..offsets[3]);
        assert_eq!(window.next_cursor.as_deref(), Some(["c", "b"][at_once - 1]));
    }
}

#[test]
fn an_index_that_calls_many_lines_one_gets_no_more_than_a_page() {
    let blob = lines(&names(PAGE_MESSAGES + 5));
    let end = blob.len() as u64;
    let index = json!({"ids": ["all"], "offsets": [0, end]}).to_string();
    let window = window(index.as_bytes(), end, &TranscriptQuery::default()).expect("an index");
    let page = Shown::of(page_within(window, &blob), &blob);
    assert_eq!((page.ids.len(), page.next_cursor.as_deref()), (PAGE_MESSAGES, Some("m5")));
}

#[test]
fn what_no_cursor_can_be_is_no_id() {
    let long = "x".repeat(ID_MAX - 1);
    let fits = &long[1..];
    for (id, shows) in [(fits, true), (long.as_str(), false)] {
        let blob =
            json!({"version": 1, "messages": [{"id": "a"}, {"id": id}], "lastOutEventId": id}).to_string();
        let page = shown(blob.as_bytes(), &query(Some(1), None));
        assert_eq!(page.ids, [if shows { id } else { "a" }]);
        assert_eq!(page.cursors.last_out_event_id.is_some(), shows);
    }
    for blob in [
        r#"{"version":1,"messages":[{"id":"b","id":"a"},{"\u0069d":"c"}]}"#,
        r#"{"messages":[{"id":"x"}],"version":2,"version":1.0,"messages":[{"id":"a"},{"id":"c"}]}"#,
    ] {
        assert_eq!(shown(blob.as_bytes(), &TranscriptQuery::default()).ids, ["a", "c"], "{blob}");
    }
}

/// What a reader gets of a page whose bytes come in pieces of this size.
async fn streamed(blob: &[u8], page: Page, size: usize) -> Vec<u8> {
    let at = |offset| usize::try_from(offset).expect("inside");
    let range = page.range();
    let bytes = Bytes::copy_from_slice(&blob[at(range.start)..at(range.end)]);
    let pieces: Vec<_> = bytes.chunks(size).map(|piece| Ok(bytes.slice_ref(piece))).collect();
    let transcript = page.transcript(futures_util::stream::iter(pieces).boxed(), true);
    let length = transcript.messages.length;
    let pieces: Vec<Bytes> = transcript.messages.bytes.try_collect().await.expect("all of them");
    assert!(pieces.iter().all(|piece| !piece.is_empty()));
    let whole = pieces.concat();
    assert_eq!(whole.len() as u64, length);
    whole
}

#[tokio::test]
async fn messages_are_cut_out_of_a_stream_however_it_is_cut_itself() {
    let one =
        br#"{"version":1,"messages":[ {"id":"a"},{"id":"b","x":[1,2]} , 0,{"id":"c"},{"id":"d"}, null ]}"#;
    for blob in [one.to_vec(), lines(&names(4))] {
        for limit in [1, 2, 4] {
            let query = query(Some(limit), None);
            let expected = page(&blob, &query).messages(&blob);
            for size in 1..40 {
                assert_eq!(streamed(&blob, page(&blob, &query), size).await, expected, "{limit} {size}");
            }
        }
    }
}

proptest! {
    #[test]
    fn whatever_the_bytes_nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..400) {
        let query = query(Some(2), None);
        window(&bytes, 300, &query);
        shown(&bytes, &query);
        let blob = lines(&names(3));
        let cut = &blob[..cut.min(blob.len())];
        shown(cut, &query);
        shown(&[&b"{\"v\":2"[..], &bytes].concat(), &query);
    }

    #[test]
    fn following_pages_shows_every_message_once(count in 0usize..20, limit in 1usize..7) {
        let blob = lines(&names(count));
        let mut seen = Vec::new();
        let mut before = None;
        loop {
            let page = by_index(&blob, &TranscriptQuery { limit: Some(limit), before }).expect("an index");
            seen.splice(0..0, page.ids);
            before = page.next_cursor;
            if before.is_none() {
                break;
            }
        }
        prop_assert_eq!(seen, names(count));
    }
}
