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

fn ids(transcript: &Transcript) -> Vec<String> {
    transcript.messages.iter().map(|message| own_id(message).expect("an id")).collect()
}

/// As the use case does it: the trailer, the index, the window.
fn by_index(blob: &[u8], query: &TranscriptQuery) -> Option<Transcript> {
    let end = blob.len() - TRAILER - 1 - usize::try_from(footer_length(blob)?).ok()?;
    let footer = Footer::parse(&blob[end..blob.len() - TRAILER], end as u64)?;
    let window = footer.window(query);
    let bytes = window.as_ref().map_or(&[][..], |window| {
        let at = |offset| usize::try_from(offset).expect("inside");
        &blob[at(window.range.start)..at(window.range.end)]
    });
    Some(footer.transcript(window.clone(), bytes))
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
        let transcript = transcript(&blob, &TranscriptQuery::default());
        assert_eq!(ids(&transcript), ["m0", "m1"]);
        assert_eq!(transcript.cursors.last_out_event_id.as_deref(), Some("7"));
        assert_eq!(transcript.cursors.last_in_event_id, None);
        assert_eq!(transcript.next_cursor, None);
    }
}

#[test]
fn what_cannot_be_read_is_left_out() {
    for blob in ["", "x", "[]", "null", r#"{"version":3,"messages":[]}"#, r#"{"v":2"#, r#"{"version":1}"#] {
        assert!(transcript(blob.as_bytes(), &TranscriptQuery::default()).messages.is_empty(), "{blob}");
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
    assert_eq!(ids(&transcript(broken.as_bytes(), &TranscriptQuery::default())), ["a", "f"]);
    let one = json!({"version": 1, "messages": [null, 1, {"id": 1}, {"id": ""}, {"id": "a"}, ["b"]]});
    assert_eq!(ids(&transcript(one.to_string().as_bytes(), &TranscriptQuery::default())), ["a"]);
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
        for page in [transcript(&blob, &query), by_index(&blob, &query).expect("an index")] {
            assert_eq!(ids(&page), expected, "{query:?}");
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
        assert!(Footer::parse(line.as_bytes(), end).is_none(), "{line}");
    }
    for tail in ["", "#tt2:000000000000001\n", "#tt2:00000000000000x1\n", "#tt2:-000000000000001\n"] {
        assert_eq!(footer_length(tail.as_bytes()), None, "{tail}");
    }
}

proptest! {
    #[test]
    fn whatever_the_bytes_nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..400) {
        let query = query(Some(2), None);
        transcript(&bytes, &query);
        let blob = lines(&names(3));
        let cut = &blob[..cut.min(blob.len())];
        transcript(cut, &query);
        transcript(&[&b"{\"v\":2"[..], &bytes].concat(), &query);
    }

    #[test]
    fn following_pages_shows_every_message_once(count in 0usize..20, limit in 1usize..7) {
        let blob = lines(&names(count));
        let mut seen = Vec::new();
        let mut before = None;
        loop {
            let page = by_index(&blob, &TranscriptQuery { limit: Some(limit), before }).expect("an index");
            seen.splice(0..0, ids(&page));
            before = page.next_cursor;
            if before.is_none() {
                break;
            }
        }
        prop_assert_eq!(seen, names(count));
    }
}
