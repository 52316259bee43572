//! The contract of `Waitpoints`, and of the runs that a `MetadataStore` records.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use sessiond::domain::run::SessionRun;
use sessiond::domain::waitpoint::{
    Completion, Outcome, WaitStatus, Waitpoint, WaitpointAnchor, WaitpointCursor, WaitpointFilter,
    WaitpointPageRequest,
};
use sessiond::domain::{
    Closure, Direction, MetadataStore, RunId, RunReason, Session, SessionPatch, WaitpointId, Waitpoints,
};

use crate::contract::suite;
use crate::harness::database::{Sql, at, named, session, words};

suite!("Waitpoints": [sqlite = Sql::sqlite, postgres = Sql::postgres], [
    a_waitpoint_comes_back_whole_and_only_here,
    a_key_finds_the_first_waitpoint_of_its_channel,
    of_fifty_concurrent_creates_with_one_key_exactly_one_inserts,
    a_key_that_has_ended_is_free_and_leaves_the_waitpoint_that_had_it,
    a_completion_is_written_once,
    of_concurrent_completions_everyone_gets_the_winners_row,
    pages_hold_every_row_once_both_ways,
    every_filter_narrows_the_list,
    open_waitpoints_come_oldest_first_from_every_environment,
    waitpoints_survive_closing_and_opening,
    a_create_records_the_first_run,
    of_fifty_concurrent_handovers_exactly_one_swaps,
    a_handover_by_the_same_request_is_found_again,
    a_closed_session_is_not_handed_over,
    runs_of_other_environments_are_not_seen,
]);

fn waitpoint(session: &Session, created_at: i64) -> Waitpoint {
    Waitpoint {
        id: WaitpointId::generate(at(created_at)),
        environment: session.environment.clone(),
        session: session.id.clone(),
        direction: Direction::In,
        run: session.current_run_id.clone(),
        after: None,
        timeout_at: None,
        expires_at: None,
        tags: Vec::new(),
        idempotency_key: None,
        key_expires_at: None,
        created_at: at(created_at),
        completion: None,
    }
}

fn by_record(seq_num: u64, millis: i64) -> Completion {
    Completion { at: at(millis), outcome: Outcome::Record(seq_num) }
}

/// A session, and a waitpoint of it that has been stored.
async fn stored(sql: &Sql) -> (Session, Waitpoint) {
    let session = sql.create(session(1000)).await.session;
    let waitpoint = waitpoint(&session, 2000);
    assert!(register(sql, &waitpoint, 2000).await.1);
    (session, waitpoint)
}

async fn register(sql: &Sql, waitpoint: &Waitpoint, now: i64) -> (Waitpoint, bool) {
    let registered = sql.store.create_waitpoint(waitpoint.clone(), at(now)).await.expect("registers");
    (registered.waitpoint, registered.created)
}

async fn found(sql: &Sql, waitpoint: &Waitpoint) -> Option<Waitpoint> {
    sql.store.find_waitpoint(&sql.here, &waitpoint.id).await.expect("answers")
}

async fn list(sql: &Sql, filter: WaitpointFilter) -> Vec<Waitpoint> {
    let request = WaitpointPageRequest::new(100, WaitpointAnchor::After(None)).expect("a size");
    sql.store.list_waitpoints(&sql.here, &filter, &request).await.expect("lists").waitpoints
}

async fn a_waitpoint_comes_back_whole_and_only_here(sql: Sql) {
    let session = sql.create(session(1000)).await.session;
    let whole = Waitpoint {
        direction: Direction::Out,
        after: Some(u64::try_from(i64::MAX).expect("fits")),
        timeout_at: Some(at(9)),
        expires_at: Some(at(8)),
        tags: words(&["b", "\u{1f600}'; --"]),
        idempotency_key: Some("k/\u{fc}".to_owned()),
        key_expires_at: Some(at(7)),
        ..waitpoint(&session, 2000)
    };
    for (n, completion) in [
        None,
        Some(by_record(0, 5)),
        Some(Completion { at: at(5), outcome: Outcome::TimedOut }),
        Some(Completion { at: at(5), outcome: Outcome::Closed }),
        Some(Completion { at: at(5), outcome: Outcome::Expired }),
    ]
    .into_iter()
    .enumerate()
    {
        let whole = Waitpoint {
            id: WaitpointId::generate(at(2000)),
            idempotency_key: Some(n.to_string()),
            completion,
            ..whole.clone()
        };
        assert_eq!(register(&sql, &whole, 1).await, (whole.clone(), true));
        assert_eq!(found(&sql, &whole).await, Some(whole.clone()));
        let elsewhere = sql.store.find_waitpoint(&sql.elsewhere, &whole.id).await.expect("answers");
        assert_eq!(elsewhere, None);
        let stranger = sql.store.complete_waitpoint(&sql.elsewhere, &whole.id, &by_record(9, 9)).await;
        assert_eq!(stranger.expect("answers"), None);
        assert_eq!(found(&sql, &whole).await, Some(whole));
    }
    let strange = WaitpointId::from_stored("waitpoint_nothing");
    assert_eq!(sql.store.find_waitpoint(&sql.here, &strange).await.expect("answers"), None);
}

async fn a_key_finds_the_first_waitpoint_of_its_channel(sql: Sql) {
    let [one, two] = [sql.create(session(1000)).await.session, sql.create(session(1001)).await.session];
    let keyed =
        |session: &Session| Waitpoint { idempotency_key: Some("k".to_owned()), ..waitpoint(session, 2000) };
    let first = keyed(&one);
    assert!(register(&sql, &first, 2000).await.1);
    assert_eq!(register(&sql, &keyed(&one), 2000).await, (first, false));
    let out = Waitpoint { direction: Direction::Out, ..keyed(&one) };
    assert!(register(&sql, &out, 2000).await.1, "another channel");
    assert!(register(&sql, &keyed(&two), 2000).await.1, "another session");
    let unkeyed = waitpoint(&one, 2000);
    assert!(register(&sql, &unkeyed, 2000).await.1);
}

async fn of_fifty_concurrent_creates_with_one_key_exactly_one_inserts(sql: Sql) {
    let session = sql.create(session(1000)).await.session;
    let creates = (0..50).map(|_| {
        let keyed = Waitpoint { idempotency_key: Some("k".to_owned()), ..waitpoint(&session, 2000) };
        let sql = &sql;
        async move { register(sql, &keyed, 2000).await }
    });
    let made = join_all(creates).await;
    assert_eq!(made.iter().filter(|(_, created)| *created).count(), 1);
    let ids: BTreeSet<_> = made.iter().map(|(waitpoint, _)| waitpoint.id.clone()).collect();
    assert_eq!(ids.len(), 1);
}

async fn a_key_that_has_ended_is_free_and_leaves_the_waitpoint_that_had_it(sql: Sql) {
    let session = sql.create(session(1000)).await.session;
    let keyed = |end| Waitpoint {
        idempotency_key: Some("k".to_owned()),
        key_expires_at: Some(at(end)),
        ..waitpoint(&session, 2000)
    };
    let first = keyed(3000);
    register(&sql, &first, 2000).await;
    assert!(!register(&sql, &keyed(9000), 2999).await.1);
    let second = keyed(9000);
    assert_eq!(register(&sql, &second, 3000).await, (second.clone(), true));
    assert_eq!(found(&sql, &first).await.expect("still there").idempotency_key, None);
    assert_eq!(register(&sql, &keyed(9000), 3001).await, (second, false));
}

async fn a_completion_is_written_once(sql: Sql) {
    let (_, waitpoint) = stored(&sql).await;
    let complete = async |completion| {
        let row = sql.store.complete_waitpoint(&sql.here, &waitpoint.id, &completion).await.expect("answers");
        row.expect("the row").completion
    };
    let first = by_record(3, 2500);
    assert_eq!(complete(first).await, Some(first));
    for other in [by_record(4, 2400), Completion { at: at(2300), outcome: Outcome::TimedOut }] {
        assert_eq!(complete(other).await, Some(first));
    }
}

async fn of_concurrent_completions_everyone_gets_the_winners_row(sql: Sql) {
    let (_, waitpoint) = stored(&sql).await;
    let again = sql.again().await;
    let completions = (0..40_u32).map(|n| {
        let store = if n % 2 == 0 { &sql.store } else { &again };
        let (here, id) = (&sql.here, &waitpoint.id);
        async move {
            let completion = by_record(n.into(), 2500);
            store.complete_waitpoint(here, id, &completion).await.expect("answers").expect("the row")
        }
    });
    let rows = join_all(completions).await;
    assert!(rows.iter().all(|row| *row == rows[0] && row.completion.is_some()), "{rows:?}");
    again.close().await;
}

async fn pages_hold_every_row_once_both_ways(sql: Sql) {
    let session = sql.create(session(1000)).await.session;
    let mut all = Vec::new();
    for n in 0..10 {
        // Several of one millisecond.
        let waitpoint = waitpoint(&session, 2000 + n / 3);
        register(&sql, &waitpoint, 2000).await;
        all.push(waitpoint);
    }
    all.sort_by(|one, other| (other.created_at, &other.id).cmp(&(one.created_at, &one.id)));
    let page = async |anchor| {
        let request = WaitpointPageRequest::new(3, anchor).expect("a size");
        sql.store.list_waitpoints(&sql.here, &WaitpointFilter::default(), &request).await.expect("lists")
    };
    let (mut forward, mut next) = (Vec::new(), None);
    loop {
        let found = page(WaitpointAnchor::After(next)).await;
        next = found.next();
        forward.extend(found.waitpoints);
        if next.is_none() {
            break;
        }
    }
    assert_eq!(forward, all);
    let (mut backward, mut previous) = (Vec::new(), None);
    loop {
        let found = page(WaitpointAnchor::Before(previous)).await;
        previous = found.previous();
        backward.splice(..0, found.waitpoints);
        if previous.is_none() {
            break;
        }
    }
    assert_eq!(backward, all);
}

async fn every_filter_narrows_the_list(sql: Sql) {
    let [one, two] = [sql.create(session(1000)).await.session, sql.create(session(1001)).await.session];
    let done =
        Waitpoint { tags: words(&["a", "b"]), completion: Some(by_record(0, 2001)), ..waitpoint(&one, 2000) };
    let late = Waitpoint {
        tags: words(&["a"]),
        completion: Some(Completion { at: at(2002), outcome: Outcome::Closed }),
        ..waitpoint(&one, 2001)
    };
    let open = Waitpoint { idempotency_key: Some("k".to_owned()), ..waitpoint(&two, 2002) };
    for waitpoint in [&done, &late, &open] {
        register(&sql, waitpoint, 2000).await;
    }
    let statuses =
        |statuses: &[WaitStatus]| WaitpointFilter { statuses: statuses.to_vec(), ..Default::default() };
    let tags = |tags: &[&str]| WaitpointFilter { tags_any: words(tags), ..Default::default() };
    for (filter, rows) in [
        (WaitpointFilter::default(), vec![&open, &late, &done]),
        (statuses(&[WaitStatus::Waiting]), vec![&open]),
        (statuses(&[WaitStatus::Completed]), vec![&done]),
        (statuses(&[WaitStatus::TimedOut]), vec![&late]),
        (statuses(&[WaitStatus::Waiting, WaitStatus::Completed]), vec![&open, &done]),
        (statuses(&WaitStatus::ALL), vec![&open, &late, &done]),
        (tags(&["a"]), vec![&late, &done]),
        (tags(&["b", "x"]), vec![&done]),
        (tags(&["\0"]), vec![]),
        (tags(&["\0", "b"]), vec![&done]),
        (WaitpointFilter { session: Some(two.id.clone()), ..Default::default() }, vec![&open]),
        (WaitpointFilter { run: Some(one.current_run_id.clone()), ..Default::default() }, vec![&late, &done]),
        (WaitpointFilter { idempotency_key: Some("k".to_owned()), ..Default::default() }, vec![&open]),
        (WaitpointFilter { idempotency_key: Some("\0".to_owned()), ..Default::default() }, vec![]),
        (WaitpointFilter { created_from: Some(at(2001)), ..Default::default() }, vec![&open, &late]),
        (WaitpointFilter { created_to: Some(at(2001)), ..Default::default() }, vec![&late, &done]),
    ] {
        let found = list(&sql, filter.clone()).await;
        assert_eq!(found.iter().collect::<Vec<_>>(), rows, "{filter:?}");
    }
    let request = WaitpointPageRequest::new(9, WaitpointAnchor::After(None)).expect("a size");
    let page = sql.store.list_waitpoints(&sql.elsewhere, &WaitpointFilter::default(), &request).await;
    assert_eq!(page.expect("lists").waitpoints, []);
}

async fn open_waitpoints_come_oldest_first_from_every_environment(sql: Sql) {
    let here = sql.create(session(1000)).await.session;
    let there = Session { environment: sql.elsewhere.clone(), ..session(1001) };
    let there = sql.create(there).await.session;
    let rows =
        [waitpoint(&here, 2000), waitpoint(&there, 2001), waitpoint(&here, 2002), waitpoint(&here, 2003)];
    for waitpoint in &rows {
        register(&sql, waitpoint, 2000).await;
    }
    let done = sql.store.complete_waitpoint(&sql.here, &rows[2].id, &by_record(0, 5)).await;
    assert!(done.expect("completes").is_some());
    let open = async |after: Option<&WaitpointCursor>, limit| {
        let rows = sql.store.open_waitpoints(after, limit).await.expect("answers");
        rows.into_iter().map(|waitpoint| waitpoint.id).collect::<Vec<_>>()
    };
    let ids: Vec<_> = rows.iter().map(|waitpoint| waitpoint.id.clone()).collect();
    assert_eq!(open(None, 9).await, [ids[0].clone(), ids[1].clone(), ids[3].clone()]);
    assert_eq!(open(None, 1).await, [ids[0].clone()]);
    assert_eq!(open(Some(&WaitpointCursor::of(&rows[0])), 9).await, [ids[1].clone(), ids[3].clone()]);
    assert_eq!(sql.store.completed_among(&ids).await.expect("answers"), [ids[2].clone()]);
    assert_eq!(sql.store.completed_among(&[]).await.expect("answers"), []);
}

async fn waitpoints_survive_closing_and_opening(sql: Sql) {
    let (_, waitpoint) = stored(&sql).await;
    sql.store.complete_waitpoint(&sql.here, &waitpoint.id, &by_record(3, 5)).await.expect("completes");
    let before = found(&sql, &waitpoint).await;
    sql.store.close().await;
    let again = sql.again().await;
    assert_eq!(again.find_waitpoint(&sql.here, &waitpoint.id).await.expect("answers"), before);
    again.close().await;
}

/// A handover from the session's run as it was.
fn next_run(session: &Session, triggered_at: i64) -> SessionRun {
    SessionRun {
        id: RunId::generate(at(triggered_at)),
        environment: session.environment.clone(),
        session: session.id.clone(),
        reason: RunReason::Upgrade,
        previous: Some(session.current_run_id.clone()),
        triggered_at: at(triggered_at),
    }
}

async fn a_create_records_the_first_run(sql: Sql) {
    let created = sql.create(named("s")).await.session;
    let again = sql.create(named("s")).await;
    assert!(!again.created);
    let runs = sql.store.runs(&sql.here, &created.id, 9).await.expect("answers");
    assert_eq!(runs.len(), 1, "{runs:?}");
    assert_eq!(
        (&runs[0].id, runs[0].reason, &runs[0].previous),
        (&created.current_run_id, RunReason::Initial, &None)
    );
    let found = sql.store.find_run(&sql.here, &created.current_run_id).await.expect("answers");
    assert_eq!(found.as_ref(), runs.first());
    let unused = again.session.current_run_id;
    assert_eq!(unused, created.current_run_id);
}

async fn of_fifty_concurrent_handovers_exactly_one_swaps(sql: Sql) {
    let created = sql.create(session(1000)).await.session;
    let again = sql.again().await;
    let handovers = (0..50).map(|n| {
        let (store, run) = (if n % 2 == 0 { &sql.store } else { &again }, next_run(&created, 2000));
        async move { store.hand_over(run, None).await.expect("answers").expect("the session") }
    });
    let done = join_all(handovers).await;
    assert_eq!(done.iter().filter(|one| one.swapped).count(), 1);
    assert!(done.iter().all(|one| one.run == done[0].run && one.session == done[0].session), "{done:?}");
    assert_eq!(done[0].session.current_run_id, done[0].run);
    assert_eq!(done[0].session.updated_at, at(2000));
    let runs = sql.store.runs(&sql.here, &created.id, 9).await.expect("answers");
    let ids: Vec<_> = runs.iter().map(|run| run.id.clone()).collect();
    assert_eq!(ids, [done[0].run.clone(), created.current_run_id.clone()]);
    assert_eq!(sql.store.runs(&sql.here, &created.id, 1).await.expect("answers"), runs[..1]);
    again.close().await;
}

async fn a_handover_by_the_same_request_is_found_again(sql: Sql) {
    let created = sql.create(session(1000)).await.session;
    let first = next_run(&created, 2000);
    let done = sql.store.hand_over(first.clone(), Some("r")).await.expect("answers").expect("the session");
    let (second, key) = (next_run(&done.session, 2000), Some("other"));
    let done = sql.store.hand_over(second.clone(), key).await.expect("answers").expect("the session");
    assert_eq!(done.session.updated_at, at(2001), "every version has a later time");
    let retried =
        sql.store.hand_over(next_run(&created, 3000), Some("r")).await.expect("answers").expect("it");
    assert_eq!((retried.swapped, retried.run), (true, first.id));
    assert_eq!(retried.session.current_run_id, second.id);
    // The same key says nothing of another session.
    let other = sql.create(session(1001)).await.session;
    let run = next_run(&other, 2000);
    let done = sql.store.hand_over(run.clone(), Some("r")).await.expect("answers").expect("the session");
    assert_eq!((done.swapped, done.run), (true, run.id));
}

async fn a_closed_session_is_not_handed_over(sql: Sql) {
    let created = sql.create(session(1000)).await.session;
    let closure = Closure { at: at(1500), reason: None };
    sql.store.close_session(&sql.here, &created.id, &closure).await.expect("closes");
    let done =
        sql.store.hand_over(next_run(&created, 2000), None).await.expect("answers").expect("the session");
    assert_eq!((done.swapped, done.run), (false, created.current_run_id.clone()));
    assert_eq!(done.session.closed, Some(closure));
    let nothing = Session { id: sessiond::domain::SessionId::from_stored("session_nothing"), ..created };
    assert!(sql.store.hand_over(next_run(&nothing, 2000), None).await.expect("answers").is_none());
}

async fn runs_of_other_environments_are_not_seen(sql: Sql) {
    let created = sql.create(session(1000)).await.session;
    let id = &created.current_run_id;
    assert_eq!(sql.store.find_run(&sql.elsewhere, id).await.expect("answers"), None);
    assert_eq!(sql.store.runs(&sql.elsewhere, &created.id, 9).await.expect("answers"), []);
    let run = SessionRun { environment: sql.elsewhere.clone(), ..next_run(&created, 2000) };
    assert!(sql.store.hand_over(run, None).await.expect("answers").is_none());
    // A change of another kind leaves the run alone.
    let patch = SessionPatch { tags: Some(words(&["t"])), ..SessionPatch::default() };
    let updated = sql.store.update_session(&sql.here, &created.id, patch, at(2000)).await.expect("answers");
    assert_eq!(updated.expect("the row").current_run_id, *id);
}
