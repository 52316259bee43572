//! The contract of `ListIndex`. What a filter means is spelled out once more in [`oracle`], over plain values.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use futures_util::{StreamExt, stream};
use sessiond::domain::list::Anchor;
use sessiond::domain::{
    Closure, Cursor, Filter, MetadataStore, Page, PageRequest, RunId, Session, SessionId, SessionPatch,
    Status, StatusSet, TagQuery, Timestamp,
};

use crate::contract::suite;
use crate::harness::Dice;
use crate::harness::database::{Sql, at, external, named, session, words};
use crate::harness::seed::{self, Spread};

suite!("ListIndex": [sqlite = Sql::sqlite, postgres = Sql::postgres, clickhouse = Sql::clickhouse, fallback = Sql::fallback], [
    an_empty_environment_has_an_empty_page,
    rows_come_newest_first_and_equal_times_by_id,
    a_page_says_whether_there_is_more_on_either_side,
    paging_forward_and_backward_meets_every_row_once,
    rows_inserted_while_paging_neither_repeat_nor_hide_any,
    a_cursor_of_a_row_that_no_longer_matches_still_works,
    every_field_filters_and_any_of_its_values_will_do,
    tags_any_needs_one_tag_and_tags_all_every_tag,
    creation_bounds_are_inclusive,
    a_session_expires_at_its_millisecond_and_closed_wins,
    random_filters_agree_with_the_oracle,
    environments_are_lists_of_their_own,
    hostile_values_are_only_text,
    a_hundred_values_in_every_field_are_taken,
    rows_come_back_whole,
    tags_are_distinct_and_in_byte_order,
    tags_can_be_asked_for_by_prefix,
    tags_can_be_searched_ignoring_ascii_case,
    tags_are_paged_by_offset_and_limit,
    changed_tags_change_filters_and_the_list_of_tags,
    a_sweep_marks_each_expired_session_once,
]);

const NOW: Timestamp = Timestamp::from_millis(10_000);

/// Whether a session matches, by the words of the contract.
fn oracle(filter: &Filter, session: &Session, now: Timestamp) -> bool {
    let any = |wanted: &[String], value: &String| wanted.is_empty() || wanted.contains(value);
    any(&filter.kinds, &session.kind)
        && any(&filter.task_identifiers, &session.task_identifier)
        && (filter.external_ids.is_empty()
            || session.external_id.as_ref().is_some_and(|id| filter.external_ids.contains(id)))
        && (filter.tags_any.is_empty() || filter.tags_any.iter().any(|tag| session.tags.contains(tag)))
        && filter.tags_all.iter().all(|tag| session.tags.contains(tag))
        && (filter.statuses.is_any() || filter.statuses.as_slice().contains(&session.status(now)))
        && filter.created_from.is_none_or(|from| session.created_at >= from)
        && filter.created_to.is_none_or(|to| session.created_at <= to)
}

/// The ids that match, in list order.
fn expected(filter: &Filter, sessions: &[Session], now: Timestamp) -> Vec<SessionId> {
    let mut rows: Vec<_> = sessions.iter().filter(|session| oracle(filter, session, now)).collect();
    rows.sort_by_key(|session| Reverse((session.created_at, session.id.clone())));
    rows.into_iter().map(|session| session.id.clone()).collect()
}

fn ids(page: &Page) -> Vec<SessionId> {
    page.sessions.iter().map(|session| session.id.clone()).collect()
}

async fn page(sql: &Sql, filter: &Filter, request: PageRequest) -> Page {
    sql.index.list(&sql.here, filter, &request, NOW).await.expect("lists")
}

/// Every page from one end to the other, as ids in list order.
async fn walk(sql: &Sql, filter: &Filter, size: usize, forward: bool, now: Timestamp) -> Vec<SessionId> {
    let mut pages: Vec<Vec<SessionId>> = Vec::new();
    let mut cursor: Option<Cursor> = None;
    loop {
        let anchor = if forward { Anchor::After(cursor) } else { Anchor::Before(cursor) };
        let request = PageRequest::new(size, anchor).expect("a size in range");
        let page = sql.index.list(&sql.here, filter, &request, now).await.expect("lists");
        pages.push(ids(&page));
        cursor = if forward { page.next() } else { page.previous() };
        if cursor.is_none() {
            break;
        }
        assert_eq!(page.sessions.len(), size, "only the last page is short");
    }
    if !forward {
        pages.reverse();
    }
    pages.concat()
}

async fn all(sql: &Sql, filter: &Filter) -> Vec<SessionId> {
    ids(&page(sql, filter, PageRequest::first(100)).await)
}

async fn tags(sql: &Sql, query: TagQuery) -> Vec<String> {
    sql.index.tags(&sql.here, &query).await.expect("lists")
}

fn any_tags() -> TagQuery {
    TagQuery { limit: 100, ..TagQuery::default() }
}

/// Sessions with every mix of fields; few distinct times, so that ties are common.
async fn populate(sql: &Sql, dice: &mut Dice, count: usize) -> Vec<Session> {
    let mut sessions = Vec::new();
    for number in 0..count {
        let created_at = 1000 + i64::try_from(dice.roll(12)).expect("fits");
        let expiry = [None, Some(at(5000)), Some(at(9999)), Some(NOW), Some(at(10_001)), Some(at(20_000))];
        let closed = (dice.roll(4) == 0).then(|| Closure { at: at(3000), reason: None });
        sessions.push(Session {
            external_id: (dice.roll(2) == 0).then(|| external(&format!("external-{number}"))),
            kind: ["chat", "voice", "Chat"][dice.roll(3)].to_owned(),
            task_identifier: ["agent", "helper", "ag%nt"][dice.roll(3)].to_owned(),
            tags: dice.some_of(&["red", "green", "blue", "r%d"]),
            expires_at: expiry[dice.roll(6)],
            closed,
            ..session(created_at)
        });
        sql.create(sessions[number].clone()).await;
    }
    sessions
}

fn random_filter(dice: &mut Dice) -> Filter {
    let statuses = Status::ALL.into_iter().filter(|_| dice.roll(2) == 0).collect();
    let sometimes = |dice: &mut Dice, choices: &[&str]| {
        if dice.roll(3) == 0 { dice.some_of(choices) } else { Vec::new() }
    };
    let names: Vec<String> = (0..40).map(|number| format!("external-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    Filter {
        kinds: sometimes(dice, &["chat", "voice", "none"]),
        tags_any: sometimes(dice, &["red", "green", "blue", "none"]),
        tags_all: sometimes(dice, &["red", "blue", "r%d"]),
        task_identifiers: sometimes(dice, &["agent", "helper"]),
        external_ids: if dice.roll(5) == 0 {
            dice.some_of(&names).iter().map(|name| external(name)).collect()
        } else {
            Vec::new()
        },
        statuses: StatusSet::new(if dice.roll(2) == 0 { statuses } else { Vec::new() }),
        created_from: (dice.roll(4) == 0).then(|| at(1000 + i64::try_from(dice.roll(12)).expect("fits"))),
        created_to: (dice.roll(4) == 0).then(|| at(1000 + i64::try_from(dice.roll(12)).expect("fits"))),
    }
}

async fn an_empty_environment_has_an_empty_page(sql: Sql) {
    for anchor in [Anchor::After(None), Anchor::Before(None)] {
        let empty = page(&sql, &Filter::default(), PageRequest { size: 10, anchor }).await;
        assert_eq!((empty.sessions.len(), empty.has_next, empty.has_previous), (0, false, false));
    }
    assert_eq!(sql.index.count(&sql.here, &Filter::default(), NOW).await.expect("counts"), 0);
    assert!(tags(&sql, any_tags()).await.is_empty());
}

async fn rows_come_newest_first_and_equal_times_by_id(sql: Sql) {
    let mut sessions = Vec::new();
    for created_at in [5, 7, 5, 6, 5] {
        sessions.push(sql.create(session(created_at)).await.session);
    }
    assert_eq!(all(&sql, &Filter::default()).await, expected(&Filter::default(), &sessions, NOW));
}

async fn a_page_says_whether_there_is_more_on_either_side(sql: Sql) {
    for created_at in 1..=5 {
        sql.create(session(created_at)).await;
    }
    let times = |page: &Page| page.sessions.iter().map(|s| s.created_at.millis()).collect::<Vec<_>>();
    let any = Filter::default();
    let first = page(&sql, &any, PageRequest::first(2)).await;
    assert_eq!((times(&first), first.has_next, first.has_previous), (vec![5, 4], true, false));
    let middle = page(&sql, &any, PageRequest { size: 2, anchor: Anchor::After(first.next()) }).await;
    assert_eq!((times(&middle), middle.has_next, middle.has_previous), (vec![3, 2], true, true));
    let back = page(&sql, &any, PageRequest { size: 2, anchor: Anchor::Before(middle.previous()) }).await;
    assert_eq!((times(&back), back.has_next, back.has_previous), (vec![5, 4], true, false));
    let oldest = page(&sql, &any, PageRequest { size: 2, anchor: Anchor::Before(None) }).await;
    assert_eq!((times(&oldest), oldest.has_next, oldest.has_previous), (vec![2, 1], false, true));
    let exact = page(&sql, &any, PageRequest::first(5)).await;
    assert_eq!((exact.sessions.len(), exact.has_next), (5, false));
}

async fn paging_forward_and_backward_meets_every_row_once(sql: Sql) {
    let sessions = populate(&sql, &mut Dice::new(7), 40).await;
    let tagged = Filter { tags_any: words(&["red", "blue"]), ..Filter::default() };
    for filter in [Filter::default(), tagged] {
        let expected = expected(&filter, &sessions, NOW);
        for size in 1..=7 {
            for forward in [true, false] {
                assert_eq!(walk(&sql, &filter, size, forward, NOW).await, expected, "{size} {forward}");
            }
        }
    }
}

async fn rows_inserted_while_paging_neither_repeat_nor_hide_any(sql: Sql) {
    let (mut dice, any) = (Dice::new(11), Filter::default());
    let mut old = BTreeSet::new();
    for size in 1..=7 {
        for forward in [true, false] {
            let (mut seen, mut cursor) = (Vec::new(), None);
            for number in 0.. {
                let anchor = if forward { Anchor::After(cursor) } else { Anchor::Before(cursor) };
                let request = PageRequest { size, anchor };
                let created_at = 1000 + i64::try_from(dice.roll(5)).expect("fits");
                // Rows are inserted on both sides of the walk, but not for ever.
                let insert = async {
                    if number < 6 {
                        sql.create(session(created_at)).await;
                    }
                };
                let (page, ()) = tokio::join!(page(&sql, &any, request), insert);
                seen.extend(ids(&page));
                cursor = if forward { page.next() } else { page.previous() };
                if cursor.is_none() {
                    break;
                }
            }
            let distinct: BTreeSet<_> = seen.iter().cloned().collect();
            assert_eq!(distinct.len(), seen.len(), "a row came twice");
            assert!(distinct.is_superset(&old), "a row was skipped");
            old = all(&sql, &any).await.into_iter().collect();
        }
    }
}

async fn a_cursor_of_a_row_that_no_longer_matches_still_works(sql: Sql) {
    let mut sessions = Vec::new();
    for created_at in 1..=4 {
        sessions.push(sql.create(session(created_at)).await.session);
    }
    let open = Filter { statuses: StatusSet::new(vec![Status::Active]), ..Filter::default() };
    let first = page(&sql, &open, PageRequest::first(2)).await;
    let closure = Closure { at: at(5), reason: None };
    sql.store.close_session(&sql.here, &sessions[2].id, &closure).await.expect("closes");
    let second = page(&sql, &open, PageRequest { size: 2, anchor: Anchor::After(first.next()) }).await;
    assert_eq!(ids(&second), [sessions[1].id.clone(), sessions[0].id.clone()]);
}

async fn every_field_filters_and_any_of_its_values_will_do(sql: Sql) {
    let voice = sql.create(Session { kind: "voice".into(), ..session(1) }).await.session.id;
    let helper = sql.create(Session { task_identifier: "helper".into(), ..session(2) }).await.session.id;
    let mine = sql.create(named("mine")).await.session.id;
    let by_kind = |kinds: &[&str]| Filter { kinds: words(kinds), ..Filter::default() };
    assert_eq!(all(&sql, &by_kind(&["voice"])).await, std::slice::from_ref(&voice));
    assert_eq!(all(&sql, &by_kind(&["voice", "chat", "voice"])).await.len(), 3);
    assert!(all(&sql, &by_kind(&["Voice"])).await.is_empty());
    let by_task = Filter { task_identifiers: words(&["helper", "unknown"]), ..Filter::default() };
    assert_eq!(all(&sql, &by_task).await, [helper]);
    let by_name = Filter { external_ids: vec![external("mine"), external("x")], ..Filter::default() };
    assert_eq!(all(&sql, &by_name).await, [mine]);
    let both = Filter { kinds: words(&["voice"]), ..by_task };
    assert!(all(&sql, &both).await.is_empty());
}

async fn tags_any_needs_one_tag_and_tags_all_every_tag(sql: Sql) {
    let mut sessions = Vec::new();
    for tags in [&["a"][..], &["b"], &["a", "b"], &["a", "b", "c"], &[]] {
        sessions.push(sql.create(Session { tags: words(tags), ..session(1) }).await.session);
    }
    for (any, every) in [
        (&["a"][..], &[][..]),
        (&["a", "b"], &[]),
        (&[], &["a"]),
        (&[], &["b", "a", "b"]),
        (&["c"], &["a", "b"]),
        (&["a", "x"], &["b"]),
        (&["x"], &[]),
    ] {
        let filter = Filter { tags_any: words(any), tags_all: words(every), ..Filter::default() };
        let expected = expected(&filter, &sessions, NOW);
        assert_eq!(all(&sql, &filter).await, expected, "{any:?} {every:?}");
        let count = sql.index.count(&sql.here, &filter, NOW).await.expect("counts");
        assert_eq!(count, expected.len() as u64, "{any:?} {every:?}");
    }
}

async fn creation_bounds_are_inclusive(sql: Sql) {
    for created_at in 1..=5 {
        sql.create(session(created_at)).await;
    }
    for (from, to, count) in
        [(Some(2), Some(4), 3), (Some(5), None, 1), (None, Some(1), 1), (Some(4), Some(3), 0)]
    {
        let filter = Filter { created_from: from.map(at), created_to: to.map(at), ..Filter::default() };
        assert_eq!(all(&sql, &filter).await.len(), count);
        assert_eq!(walk(&sql, &filter, 1, true, NOW).await.len(), count);
        assert_eq!(walk(&sql, &filter, 1, false, NOW).await.len(), count);
    }
}

async fn a_session_expires_at_its_millisecond_and_closed_wins(sql: Sql) {
    let expiring = sql.create(Session { expires_at: Some(at(500)), ..session(1) }).await.session;
    let closure = Some(Closure { at: at(2), reason: None });
    let closed = Session { expires_at: Some(at(500)), closed: closure, ..session(1) };
    let closed = sql.create(closed).await.session;
    for swept in [false, true] {
        if swept {
            sql.store.sweep_expired(at(600)).await.expect("sweeps");
        }
        for (now, status) in [(499, Status::Active), (500, Status::Expired), (501, Status::Expired)] {
            for wanted in Status::ALL {
                let filter = Filter { statuses: StatusSet::new(vec![wanted]), ..Filter::default() };
                let found = walk(&sql, &filter, 1, true, at(now)).await;
                let expected: Vec<_> = [(&expiring, status), (&closed, Status::Closed)]
                    .into_iter()
                    .filter(|(_, status)| *status == wanted)
                    .map(|(session, _)| session.id.clone())
                    .collect();
                assert_eq!(found, expected, "{wanted:?} at {now}, swept: {swept}");
            }
        }
    }
}

async fn random_filters_agree_with_the_oracle(sql: Sql) {
    let mut dice = Dice::new(3);
    let sessions = populate(&sql, &mut dice, 60).await;
    // The hint that a sweep leaves may be missing, fresh, or ahead of the time that is asked for.
    for sweep in [None, Some(at(9999)), Some(at(15_000))] {
        if let Some(until) = sweep {
            sql.store.sweep_expired(until).await.expect("sweeps");
        }
        let questions: Vec<_> = (0..60)
            .map(|_| {
                let filter = random_filter(&mut dice);
                let now = [at(5000), NOW, at(10_001), at(30_000)][dice.roll(4)];
                (filter, now, 1 + dice.roll(7), dice.roll(2) == 0)
            })
            .collect();
        let (sql, sessions) = (&sql, &sessions);
        let asked = stream::iter(&questions).map(|(filter, now, size, forward)| async move {
            let now = *now;
            for session in sessions {
                assert_eq!(
                    filter.matches(session, now),
                    oracle(filter, session, now),
                    "{filter:?} {session:?}"
                );
            }
            let expected = expected(filter, sessions, now);
            let found = walk(sql, filter, *size, *forward, now).await;
            assert_eq!(found, expected, "{sweep:?}, {now:?}: {filter:?}");
            let count = sql.index.count(&sql.here, filter, now).await.expect("counts");
            assert_eq!(count, expected.len() as u64, "{filter:?}");
        });
        asked.buffer_unordered(4).collect::<Vec<()>>().await;
    }
}

async fn environments_are_lists_of_their_own(sql: Sql) {
    let tagged = Session { tags: words(&["shared"]), ..named("same") };
    let ours = sql.create(tagged.clone()).await.session.id;
    let theirs = Session {
        id: SessionId::generate(at(1)),
        current_run_id: RunId::generate(at(1)),
        environment: sql.elsewhere.clone(),
        ..tagged
    };
    sql.create(Session { tags: words(&["shared", "theirs"]), ..theirs }).await;
    let filters = [
        Filter::default(),
        Filter { kinds: words(&["chat"]), ..Filter::default() },
        Filter { task_identifiers: words(&["agent"]), ..Filter::default() },
        Filter { tags_any: words(&["shared", "theirs"]), ..Filter::default() },
        Filter { tags_all: words(&["shared"]), kinds: words(&["chat"]), ..Filter::default() },
        Filter { external_ids: vec![external("same")], ..Filter::default() },
        Filter { statuses: StatusSet::new(vec![Status::Active]), ..Filter::default() },
    ];
    for filter in filters {
        assert_eq!(all(&sql, &filter).await, std::slice::from_ref(&ours), "{filter:?}");
        assert_eq!(sql.index.count(&sql.here, &filter, NOW).await.expect("counts"), 1, "{filter:?}");
    }
    assert_eq!(tags(&sql, any_tags()).await, ["shared"]);
}

async fn hostile_values_are_only_text(sql: Sql) {
    sql.create(Session { tags: words(&["a"]), ..session(1) }).await;
    for text in ["a\0", "'", "\" OR 1=1 --", "%", "_", "\\", "$1", "\u{1f600}"] {
        for filter in [
            Filter { kinds: words(&[text]), ..Filter::default() },
            Filter { task_identifiers: words(&[text]), ..Filter::default() },
            Filter { tags_any: words(&[text]), ..Filter::default() },
            Filter { tags_all: words(&["a", text]), ..Filter::default() },
        ] {
            assert!(all(&sql, &filter).await.is_empty(), "{filter:?}");
            assert_eq!(sql.index.count(&sql.here, &filter, NOW).await.expect("counts"), 0);
        }
        for query in [
            TagQuery { prefix: Some(text.to_owned()), ..any_tags() },
            TagQuery { contains: Some(text.to_owned()), ..any_tags() },
        ] {
            assert!(tags(&sql, query).await.is_empty(), "{text:?}");
        }
    }
}

async fn a_hundred_values_in_every_field_are_taken(sql: Sql) {
    let mine =
        Session { tags: words(&["7", "9"]), kind: "7".into(), task_identifier: "7".into(), ..named("7") };
    let mine = sql.create(mine).await.session.id;
    let many: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    let names = many.iter().map(|name| external(name)).collect();
    for filter in [
        Filter { tags_any: many.clone(), ..Filter::default() },
        Filter { kinds: many.clone(), tags_any: many.clone(), ..Filter::default() },
        Filter { task_identifiers: many.clone(), kinds: many.clone(), ..Filter::default() },
        Filter { kinds: many.clone(), task_identifiers: many, external_ids: names, ..Filter::default() },
    ] {
        assert_eq!(all(&sql, &filter).await, std::slice::from_ref(&mine));
    }
}

async fn rows_come_back_whole(sql: Sql) {
    let metadata = serde_json::json!({"k": [1, "two", null]}).as_object().cloned();
    let whole = Session {
        tags: words(&["b", "a"]),
        trigger_config: metadata.clone(),
        metadata,
        expires_at: Some(at(99)),
        closed: Some(Closure { at: at(5), reason: Some("done".into()) }),
        ..named("mine")
    };
    sql.create(whole.clone()).await;
    assert_eq!(page(&sql, &Filter::default(), PageRequest::first(1)).await.sessions, [whole]);
}

async fn tags_are_distinct_and_in_byte_order(sql: Sql) {
    for list in
        [&["b", "a", "B"][..], &["a", "_", "\u{e9}"], &["a b", "a-b", "ab", "Z"], &["\u{1f600}", "\u{ffff}"]]
    {
        sql.create(Session { tags: words(list), ..session(1) }).await;
    }
    let found = tags(&sql, any_tags()).await;
    let mut sorted = found.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(found.len(), 11);
    assert_eq!(found, sorted);
}

async fn tags_can_be_asked_for_by_prefix(sql: Sql) {
    let list = ["user:1", "user:2", "User:3", "user", "use_", "\u{e9}t\u{e9}"];
    sql.create(Session { tags: words(&list), ..session(1) }).await;
    for (prefix, expected) in [
        ("user", &["user", "user:1", "user:2"][..]),
        ("user:", &["user:1", "user:2"]),
        ("use_", &["use_"]),
        ("\u{e9}t", &["\u{e9}t\u{e9}"]),
        ("zzz", &[]),
    ] {
        let query = TagQuery { prefix: Some(prefix.to_owned()), ..any_tags() };
        assert_eq!(tags(&sql, query).await, expected, "{prefix}");
    }
    let nothing_asked = TagQuery { prefix: Some(String::new()), contains: Some(String::new()), ..any_tags() };
    assert_eq!(tags(&sql, nothing_asked).await.len(), list.len());
}

async fn tags_can_be_searched_ignoring_ascii_case(sql: Sql) {
    let list = ["Alpha", "ALPHABET", "beta", "50%", "a_b", "\u{c9}t\u{e9}"];
    sql.create(Session { tags: words(&list), ..session(1) }).await;
    for (part, expected) in [
        ("alpha", &["ALPHABET", "Alpha"][..]),
        ("PHA", &["ALPHABET", "Alpha"]),
        ("%", &["50%"]),
        ("_", &["a_b"]),
        ("\u{c9}T", &["\u{c9}t\u{e9}"]),
        ("\u{e9}t", &[]),
    ] {
        let query = TagQuery { contains: Some(part.to_owned()), ..any_tags() };
        assert_eq!(tags(&sql, query).await, expected, "{part}");
    }
    let both = TagQuery { prefix: Some("AL".into()), contains: Some("bet".into()), ..any_tags() };
    assert_eq!(tags(&sql, both).await, ["ALPHABET"]);
}

async fn tags_are_paged_by_offset_and_limit(sql: Sql) {
    sql.create(Session { tags: words(&["a", "b", "c", "d", "e"]), ..session(1) }).await;
    let part = |offset, limit| tags(&sql, TagQuery { offset, limit, ..TagQuery::default() });
    assert_eq!(part(0, 2).await, ["a", "b"]);
    assert_eq!(part(3, 5).await, ["d", "e"]);
    assert!(part(5, 5).await.is_empty());
    assert!(part(0, 0).await.is_empty());
    assert_eq!(part(4, usize::MAX).await, ["e"]);
}

async fn changed_tags_change_filters_and_the_list_of_tags(sql: Sql) {
    let mine = sql.create(Session { tags: words(&["old", "kept"]), ..session(1) }).await.session.id;
    let patch = SessionPatch { tags: Some(words(&["kept", "new"])), ..SessionPatch::default() };
    sql.store.update_session(&sql.here, &mine, patch, at(5)).await.expect("updates");
    assert_eq!(tags(&sql, any_tags()).await, ["kept", "new"]);
    for (tag, found) in [("old", 0), ("kept", 1), ("new", 1)] {
        let filter = Filter { tags_any: words(&[tag]), ..Filter::default() };
        assert_eq!(all(&sql, &filter).await.len(), found, "{tag}");
    }
    let patch = SessionPatch { tags: Some(Vec::new()), ..SessionPatch::default() };
    sql.store.update_session(&sql.here, &mine, patch, at(6)).await.expect("updates");
    assert!(tags(&sql, any_tags()).await.is_empty());
}

async fn a_sweep_marks_each_expired_session_once(sql: Sql) {
    let closure = Some(Closure { at: at(2), reason: None });
    sql.create(Session { expires_at: Some(at(500)), ..session(1) }).await;
    sql.create(Session { expires_at: Some(at(501)), ..session(1) }).await;
    sql.create(Session { expires_at: Some(at(400)), closed: closure, ..session(1) }).await;
    let elsewhere = sql.elsewhere.clone();
    sql.create(Session { environment: elsewhere, expires_at: Some(at(1)), ..session(1) }).await;
    for marked in [2, 0] {
        assert_eq!(sql.store.sweep_expired(at(500)).await.expect("sweeps"), marked);
    }
}

#[tokio::test]
async fn seeded_sessions_are_spread_as_they_say() {
    for (spread, counts) in [
        (Spread::Uniform, [300, 200, 100]),
        (Spread::AllExpireLater, [600, 0, 0]),
        (Spread::AllExpired, [0, 0, 600]),
    ] {
        let sql = Sql::sqlite().await;
        seed::sessions(&sql.database.url, sql.here.as_str(), 600, spread).await.expect("seeds");
        for (status, count) in Status::ALL.into_iter().zip(counts) {
            let filter = Filter { statuses: StatusSet::new(vec![status]), ..Filter::default() };
            let found = sql.index.count(&sql.here, &filter, at(seed::NOW)).await.expect("counts");
            assert_eq!(found, count, "{spread:?} {status:?}");
        }
        assert_eq!(walk(&sql, &Filter::default(), 100, true, at(seed::NOW)).await.len(), 600);
    }
}
