//! The contract of `MetadataStore`.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use sea_orm::ConnectionTrait;
use serde_json::json;
use sessiond::domain::access::Scopes;
use sessiond::domain::port::Inserted;
use sessiond::domain::tenant::StoredKey;
use sessiond::domain::{
    Closure, EnvironmentId, Error, KeyId, MetadataStore, Session, SessionPatch, SessionRef,
};
use sessiond::store::metadata::{OpenError, OpenOptions, SqlMetadata, migrate};

use crate::contract::suite;
use crate::harness::database::{Sql, TestDatabase, at, environment, external, named, session, words};

suite!("MetadataStore": [sqlite = Sql::sqlite, postgres = Sql::postgres], [
    a_created_session_comes_back_whole_by_either_id,
    text_of_every_script_comes_back_unchanged,
    a_repeated_external_id_finds_the_first_session_unchanged,
    a_repeated_request_key_finds_the_first_session,
    a_request_key_does_not_count_for_a_session_with_an_external_id,
    creates_without_any_key_are_independent,
    of_fifty_concurrent_creates_with_one_external_id_exactly_one_inserts,
    of_fifty_concurrent_creates_with_one_request_key_exactly_one_inserts,
    a_request_key_with_nul_is_invalid,
    environments_do_not_see_each_other,
    an_absent_session_is_none,
    many_sessions_are_found_by_their_ids_and_only_here,
    a_scan_meets_every_session_of_every_environment_once,
    an_update_changes_only_what_it_names,
    every_update_has_a_later_time_than_the_one_before,
    an_update_clears_metadata_and_external_id,
    a_cleared_external_id_is_free_for_another_session,
    a_taken_external_id_is_a_conflict_and_changes_nothing,
    an_update_may_name_the_external_id_that_the_session_has,
    concurrent_updates_of_different_fields_are_all_kept,
    a_closure_is_written_once,
    of_concurrent_closes_everyone_gets_the_winners_row,
    a_late_close_does_not_turn_updated_at_back,
    completing_a_close_needs_no_environment_and_overwrites_nothing,
    environments_come_oldest_first_and_slugs_are_unique_in_a_project,
    keys_come_newest_first_and_only_of_their_environment,
    a_key_is_found_by_its_lookup_whatever_its_environment,
    the_same_secret_twice_is_a_conflict,
    a_sample_of_keys_holds_the_oldest_and_the_newest_that_live,
    a_key_is_marked_as_given_in_its_own_environment_only,
    a_key_only_ever_ends_earlier,
    every_change_of_a_key_advances_the_revision_for_every_process,
    the_first_log_to_claim_the_store_keeps_it,
    rows_survive_closing_and_opening,
    a_ping_answers,
    a_row_that_cannot_be_read_is_named,
    a_store_that_is_closed_is_unavailable,
    a_schema_from_a_newer_binary_is_refused,
]);

/// How much later an update is than the one before at least.
const MILLISECOND: Duration = Duration::from_millis(1);

fn closure(millis: i64, reason: &str) -> Closure {
    Closure { at: at(millis), reason: Some(reason.to_owned()) }
}

fn key(id: &str, environment: &EnvironmentId, created_at: i64) -> StoredKey {
    StoredKey {
        id: KeyId::from_stored(id),
        environment: environment.clone(),
        label: "a key".to_owned(),
        lookup: format!("lookup of {id}").into_bytes(),
        sealed_secret: vec![0, 1, 255],
        hint: "tr_prod_ab".to_owned(),
        scopes: None,
        created_at: at(created_at),
        ends_at: None,
        given: false,
    }
}

async fn found(sql: &Sql, session: &Session) -> Session {
    let row = sql.store.find_session(&sql.here, &session.id.clone().into()).await.expect("answers");
    row.expect("the session is there")
}

async fn update(sql: &Sql, session: &Session, patch: SessionPatch) -> Session {
    let row = sql.store.update_session(&sql.here, &session.id, patch, at(5000)).await.expect("updates");
    row.expect("the session is there")
}

fn object(value: &serde_json::Value) -> Option<serde_json::Map<String, serde_json::Value>> {
    value.as_object().cloned()
}

fn naming(id: Option<&str>) -> SessionPatch {
    SessionPatch { external_id: Some(id.map(external)), ..SessionPatch::default() }
}

async fn a_created_session_comes_back_whole_by_either_id(sql: Sql) {
    let created = Session {
        tags: words(&["b", "a"]),
        metadata: object(&json!({"n": 1.5, "deep": [{"x": null}], "big": u64::MAX, "": "empty key"})),
        trigger_config: object(&json!({})),
        expires_at: Some(at(9_000_000_000_000)),
        closed: Some(closure(4, "was closed before")),
        ..named("mine")
    };
    let inserted = sql.create(created.clone()).await;
    assert!(inserted.created);
    assert_eq!(inserted.session, created);
    assert_eq!(found(&sql, &created).await, created);
    let by_name = sql.store.find_session(&sql.here, &SessionRef::External(external("mine"))).await;
    assert_eq!(by_name.expect("answers"), Some(created));
}

async fn text_of_every_script_comes_back_unchanged(sql: Sql) {
    for text in ["a/b%2f", "'; DROP TABLE sessions; --", "\u{1f600}\u{fc}\u{200b}x", "$1 ? \\ \"", "\u{1}\t"]
    {
        let created = Session {
            kind: text.to_owned(),
            task_identifier: text.to_owned(),
            tags: vec![text.to_owned()],
            metadata: object(&json!({ text: text })),
            external_id: Some(external(&format!("x{text}x"))),
            ..session(1)
        };
        sql.create(created.clone()).await;
        assert_eq!(found(&sql, &created).await, created);
    }
}

async fn a_repeated_external_id_finds_the_first_session_unchanged(sql: Sql) {
    let first = Session { tags: words(&["first"]), ..named("same") };
    sql.create(first.clone()).await;
    let again = sql.create(Session { tags: words(&["second"]), ..named("same") }).await;
    assert!(!again.created);
    assert_eq!(again.session, first);
}

async fn a_repeated_request_key_finds_the_first_session(sql: Sql) {
    let first = sql.store.create_session(session(1), Some("key")).await.expect("created");
    let again = sql.store.create_session(session(2), Some("key")).await.expect("found");
    let other = sql.store.create_session(session(3), Some("other")).await.expect("created");
    assert!(first.created && !again.created && other.created);
    assert_eq!(again.session, first.session);
    update(&sql, &first.session, naming(Some("named later"))).await;
    let later = sql.store.create_session(session(4), Some("key")).await.expect("found");
    assert_eq!((later.created, later.session.id), (false, first.session.id));
}

async fn a_request_key_does_not_count_for_a_session_with_an_external_id(sql: Sql) {
    for name in ["a", "b"] {
        assert!(sql.store.create_session(named(name), Some("key")).await.expect("created").created);
    }
    assert!(sql.store.create_session(session(1), Some("key")).await.expect("created").created);
}

async fn creates_without_any_key_are_independent(sql: Sql) {
    assert!(sql.create(session(1)).await.created);
    assert!(sql.create(session(1)).await.created);
}

fn assert_one_inserted(answers: Vec<sessiond::domain::Result<Inserted>>) {
    let answers: Vec<Inserted> = answers.into_iter().map(|answer| answer.expect("answers")).collect();
    assert_eq!(answers.iter().filter(|answer| answer.created).count(), 1);
    assert_eq!(answers.iter().map(|answer| &answer.session.id).collect::<BTreeSet<_>>().len(), 1);
}

async fn of_fifty_concurrent_creates_with_one_external_id_exactly_one_inserts(sql: Sql) {
    let stores = [sql.store.clone(), sql.again().await];
    let create = |n: usize| stores[n % 2].create_session(named("contended"), None);
    assert_one_inserted(join_all((0..50).map(create)).await);
}

async fn of_fifty_concurrent_creates_with_one_request_key_exactly_one_inserts(sql: Sql) {
    let stores = [sql.store.clone(), sql.again().await];
    let create = |n: usize| stores[n % 2].create_session(session(1), Some("contended"));
    assert_one_inserted(join_all((0..50).map(create)).await);
}

async fn a_request_key_with_nul_is_invalid(sql: Sql) {
    let refused = sql.store.create_session(session(1), Some("a\0b")).await;
    assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
}

async fn environments_do_not_see_each_other(sql: Sql) {
    let ours = sql.create(named("same")).await.session;
    let theirs = Session { environment: sql.elsewhere.clone(), ..named("same") };
    assert!(sql.create(theirs.clone()).await.created);
    let same = SessionRef::External(external("same"));
    for (environment, id) in [(&sql.here, &ours.id), (&sql.elsewhere, &theirs.id)] {
        let row = sql.store.find_session(environment, &same).await.expect("answers").expect("is there");
        assert_eq!(&row.id, id);
    }
    let there = &sql.elsewhere;
    let id = &ours.id;
    assert_eq!(sql.store.find_session(there, &id.clone().into()).await.expect("answers"), None);
    let patched = sql.store.update_session(there, id, naming(None), at(2)).await.expect("answers");
    assert_eq!(patched, None);
    assert_eq!(sql.store.close_session(there, id, &closure(2, "no")).await.expect("answers"), None);
    assert_eq!(found(&sql, &ours).await, ours);
    for environment in [&sql.here, &sql.elsewhere] {
        let keyed = Session { environment: environment.clone(), ..session(1) };
        assert!(sql.store.create_session(keyed, Some("key")).await.expect("created").created);
    }
}

async fn an_absent_session_is_none(sql: Sql) {
    let absent = session(1);
    let address = absent.id.clone().into();
    assert_eq!(sql.store.find_session(&sql.here, &address).await.expect("answers"), None);
    let patched = sql.store.update_session(&sql.here, &absent.id, naming(None), at(2)).await;
    assert_eq!(patched.expect("answers"), None);
    let closed = sql.store.close_session(&sql.here, &absent.id, &closure(2, "no")).await;
    assert_eq!(closed.expect("answers"), None);
    sql.store.complete_close(&absent.id, &closure(2, "no")).await.expect("nothing to do");
}

async fn many_sessions_are_found_by_their_ids_and_only_here(sql: Sql) {
    let mut ours = Vec::new();
    for n in 0..3 {
        let created = Session { tags: words(&["a"]), ..session(n) };
        ours.push(sql.create(created).await.session);
    }
    let theirs = sql.create(Session { environment: sql.elsewhere.clone(), ..session(1) }).await.session;
    let absent = session(1).id;
    let asked = [&ours[2].id, &absent, &theirs.id, &ours[0].id, &ours[2].id].map(Clone::clone);
    let mut found = sql.store.find_sessions(&sql.here, &asked).await.expect("answers");
    found.sort_by_key(|session| session.created_at);
    assert_eq!(found, [ours[0].clone(), ours[2].clone()]);
    assert_eq!(sql.store.find_sessions(&sql.here, &[]).await.expect("answers"), []);
    let many: Vec<_> = (0..500).map(|_| session(1).id).chain([theirs.id.clone()]).collect();
    assert_eq!(sql.store.find_sessions(&sql.elsewhere, &many).await.expect("answers"), [theirs]);
}

async fn every_update_has_a_later_time_than_the_one_before(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    let stores = [sql.store.clone(), sql.again().await];
    let updates = (0..20_usize).map(|n| {
        let (store, here, id) = (&stores[n % 2], &sql.here, &mine.id);
        async move {
            let row =
                store.update_session(here, id, SessionPatch::default(), at(900)).await.expect("updates");
            row.expect("is there").updated_at
        }
    });
    let times: BTreeSet<_> = join_all(updates).await.into_iter().collect();
    assert_eq!(times, (1001..=1020).map(at).collect());
    assert_eq!(update(&sql, &mine, SessionPatch::default()).await.updated_at, at(5000));
}

async fn a_scan_meets_every_session_of_every_environment_once(sql: Sql) {
    let elsewhere = Session { environment: sql.elsewhere.clone(), ..session(3000) };
    let mut created = Vec::new();
    for session in [session(9000), session(1000), elsewhere, session(5000), session(5000)] {
        created.push(sql.create(session).await.session);
    }
    created.sort_by(|a, b| a.id.cmp(&b.id));
    let mut scanned = Vec::new();
    loop {
        let after = scanned.last().map(|session: &Session| session.id.clone());
        let page = sql.store.scan_sessions(after.as_ref(), 2).await.expect("scans");
        if page.is_empty() {
            break;
        }
        scanned.extend(page);
    }
    assert_eq!(scanned, created);
}

async fn an_update_changes_only_what_it_names(sql: Sql) {
    let before = Session {
        tags: words(&["a", "b"]),
        metadata: object(&json!({"k": 1})),
        trigger_config: object(&json!({"t": 1})),
        ..named("mine")
    };
    sql.create(before.clone()).await;
    let mut expected = Session { updated_at: at(5000), ..before.clone() };
    assert_eq!(update(&sql, &before, SessionPatch::default()).await, expected);
    expected.updated_at = expected.updated_at.plus(MILLISECOND);
    expected.tags = words(&["c", "a"]);
    let patch = SessionPatch { tags: Some(words(&["c", "a"])), ..SessionPatch::default() };
    assert_eq!(update(&sql, &before, patch).await, expected);
    expected.updated_at = expected.updated_at.plus(MILLISECOND);
    expected.metadata = object(&json!({"k": 2}));
    let patch = SessionPatch { metadata: Some(expected.metadata.clone()), ..SessionPatch::default() };
    assert_eq!(update(&sql, &before, patch).await, expected);
    expected.updated_at = expected.updated_at.plus(MILLISECOND);
    expected.trigger_config = object(&json!({"t": 2}));
    let patch = SessionPatch { trigger_config: expected.trigger_config.clone(), ..SessionPatch::default() };
    assert_eq!(update(&sql, &before, patch).await, expected);
    expected.updated_at = expected.updated_at.plus(MILLISECOND);
    expected.external_id = Some(external("renamed"));
    assert_eq!(update(&sql, &before, naming(Some("renamed"))).await, expected);
    assert_eq!(found(&sql, &before).await, expected);
}

async fn an_update_clears_metadata_and_external_id(sql: Sql) {
    let before = sql.create(Session { metadata: object(&json!({"k": 1})), ..named("mine") }).await.session;
    let patch = SessionPatch { metadata: Some(None), external_id: Some(None), ..SessionPatch::default() };
    let after = update(&sql, &before, patch).await;
    assert_eq!((after.metadata, after.external_id), (None, None));
    let gone = sql.store.find_session(&sql.here, &SessionRef::External(external("mine"))).await;
    assert_eq!(gone.expect("answers"), None);
}

async fn a_cleared_external_id_is_free_for_another_session(sql: Sql) {
    let first = sql.create(named("reused")).await.session;
    update(&sql, &first, naming(None)).await;
    let second = sql.create(named("reused")).await;
    assert!(second.created);
    assert_ne!(second.session.id, first.id);
}

async fn a_taken_external_id_is_a_conflict_and_changes_nothing(sql: Sql) {
    sql.create(named("taken")).await;
    let mine = sql.create(Session { tags: words(&["before"]), ..named("mine") }).await.session;
    let patch = SessionPatch { tags: Some(words(&["after"])), ..naming(Some("taken")) };
    let refused = sql.store.update_session(&sql.here, &mine.id, patch, at(5000)).await;
    assert!(matches!(&refused, Err(Error::Conflict(text)) if text.starts_with("externalId")), "{refused:?}");
    assert_eq!(found(&sql, &mine).await, mine);
}

async fn an_update_may_name_the_external_id_that_the_session_has(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    assert_eq!(update(&sql, &mine, naming(Some("mine"))).await.external_id, Some(external("mine")));
}

async fn concurrent_updates_of_different_fields_are_all_kept(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    let other = sql.again().await;
    let metadata = object(&json!({"kept": true}));
    let patches = [
        SessionPatch { tags: Some(words(&["kept"])), ..SessionPatch::default() },
        SessionPatch { metadata: Some(metadata.clone()), ..SessionPatch::default() },
        naming(Some("kept")),
    ];
    let stores = [&sql.store, &other, &sql.store];
    let updates = stores.iter().zip(patches).map(|(store, patch)| {
        let (here, id) = (&sql.here, &mine.id);
        async move { store.update_session(here, id, patch, at(6)).await.expect("updates") }
    });
    join_all(updates).await;
    let after = found(&sql, &mine).await;
    assert_eq!(
        (after.tags, after.metadata, after.external_id),
        (words(&["kept"]), metadata, Some(external("kept")))
    );
}

async fn a_closure_is_written_once(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    for (millis, reason) in [(2000, "first"), (3000, "second")] {
        let row = sql.store.close_session(&sql.here, &mine.id, &closure(millis, reason)).await;
        let row = row.expect("answers").expect("is there");
        assert_eq!(row.closed, Some(closure(2000, "first")));
        assert_eq!(row.updated_at, at(2000));
    }
    let silent = sql.create(session(1)).await.session;
    let wordless = Closure { at: at(9), reason: None };
    let row = sql.store.close_session(&sql.here, &silent.id, &wordless).await.expect("answers");
    assert_eq!(row.expect("is there").closed, Some(wordless));
}

async fn of_concurrent_closes_everyone_gets_the_winners_row(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    let stores = [sql.store.clone(), sql.again().await];
    let closes = (0..20_usize).map(|n| {
        let (store, here, id) = (&stores[n % 2], &sql.here, &mine.id);
        async move { store.close_session(here, id, &closure(2000, &n.to_string())).await.expect("answers") }
    });
    let reasons: BTreeSet<_> = join_all(closes)
        .await
        .into_iter()
        .map(|row| row.expect("is there").closed.expect("closed").reason)
        .collect();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
}

async fn a_late_close_does_not_turn_updated_at_back(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    update(&sql, &mine, SessionPatch::default()).await;
    sql.store.complete_close(&mine.id, &closure(2000, "sealed before the update")).await.expect("closes");
    let row = found(&sql, &mine).await;
    assert_eq!((row.updated_at, row.closed.map(|closed| closed.at)), (at(5000), Some(at(2000))));
}

async fn completing_a_close_needs_no_environment_and_overwrites_nothing(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    let bystander = sql.create(named("bystander")).await.session;
    for reason in ["first", "second"] {
        sql.store.complete_close(&mine.id, &closure(2000, reason)).await.expect("closes");
    }
    assert_eq!(found(&sql, &mine).await.closed, Some(closure(2000, "first")));
    assert_eq!(found(&sql, &bystander).await, bystander);
}

async fn environments_come_oldest_first_and_slugs_are_unique_in_a_project(sql: Sql) {
    let young =
        sessiond::domain::tenant::Environment { created_at: at(9), ..environment("env_1", "main", "x") };
    let old =
        sessiond::domain::tenant::Environment { created_at: at(0), ..environment("env_2", "other", "x") };
    for new in [&young, &old] {
        sql.store.create_environment(new.clone()).await.expect("created");
    }
    let all = sql.store.environments().await.expect("answers");
    assert_eq!(all.len(), 4);
    assert_eq!((all.first(), all.last()), (Some(&old), Some(&young)));
    let clash = sql.store.create_environment(environment("env_3", "main", "x")).await;
    assert!(matches!(&clash, Err(Error::Conflict(text)) if text.contains("slug")), "{clash:?}");
}

async fn keys_come_newest_first_and_only_of_their_environment(sql: Sql) {
    let scopes = Some(Scopes::new(words(&["read:sessions", "write:sessions:a:b"])));
    let old = StoredKey { scopes, ends_at: Some(at(3)), ..key("key_a", &sql.here, 1) };
    let new = StoredKey { given: true, ..key("key_b", &sql.here, 2) };
    for key in [old.clone(), new.clone(), key("key_c", &sql.elsewhere, 3)] {
        sql.store.insert_key(key).await.expect("stored");
    }
    assert_eq!(sql.store.keys(&sql.here).await.expect("answers"), [new, old]);
}

async fn a_key_is_found_by_its_lookup_whatever_its_environment(sql: Sql) {
    for key in [key("key_a", &sql.here, 1), key("key_b", &sql.elsewhere, 1)] {
        sql.store.insert_key(key.clone()).await.expect("stored");
        assert_eq!(sql.store.find_key(&key.lookup).await.expect("answers"), Some(key));
    }
    assert_eq!(sql.store.find_key(b"unknown").await.expect("answers"), None);
}

async fn the_same_secret_twice_is_a_conflict(sql: Sql) {
    let first = key("key_a", &sql.here, 1);
    sql.store.insert_key(first.clone()).await.expect("stored");
    let revision = sql.store.key_revision().await.expect("answers");
    let clash = sql.store.insert_key(StoredKey { id: KeyId::from_stored("key_b"), ..first }).await;
    assert!(matches!(clash, Err(Error::Conflict(_))), "{clash:?}");
    assert_eq!(sql.store.key_revision().await.expect("answers"), revision);
}

async fn a_sample_of_keys_holds_the_oldest_and_the_newest_that_live(sql: Sql) {
    assert_eq!(sql.store.sample_keys(at(5), 2).await.expect("answers"), []);
    for (number, ends_at) in [(1, Some(at(5))), (2, Some(at(6))), (3, None), (4, None), (5, None), (6, None)]
    {
        let environment = if number % 2 == 0 { &sql.here } else { &sql.elsewhere };
        let key = StoredKey { ends_at, ..key(&format!("key_{number}"), environment, number) };
        sql.store.insert_key(key).await.expect("stored");
    }
    let sample = async |limit| {
        let sample = sql.store.sample_keys(at(5), limit).await.expect("answers");
        sample.iter().map(|key| key.id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(sample(2).await, ["key_2", "key_3", "key_6", "key_5"]);
    assert_eq!(sample(9).await, ["key_2", "key_3", "key_4", "key_5", "key_6"], "each once");
}

async fn a_key_is_marked_as_given_in_its_own_environment_only(sql: Sql) {
    for id in ["key_a", "key_b"] {
        sql.store.insert_key(key(id, &sql.here, 1)).await.expect("stored");
    }
    let given = async || {
        let keys = sql.store.keys(&sql.here).await.expect("answers");
        keys.iter().filter(|key| key.given).map(|key| key.id.to_string()).collect::<Vec<_>>()
    };
    let id = KeyId::from_stored("key_a");
    sql.store.mark_key_given(&sql.elsewhere, &id).await.expect("answers");
    assert!(given().await.is_empty());
    sql.store.mark_key_given(&sql.here, &id).await.expect("marked");
    assert_eq!(given().await, ["key_a"]);
}

async fn a_key_only_ever_ends_earlier(sql: Sql) {
    let id = KeyId::from_stored("key_a");
    sql.store.insert_key(key("key_a", &sql.here, 1)).await.expect("stored");
    for (asked, stands) in [(500, 500), (900, 500), (200, 200)] {
        let row = sql.store.end_key(&sql.here, &id, at(asked)).await.expect("answers").expect("is there");
        assert_eq!(row.ends_at, Some(at(stands)));
    }
    assert_eq!(sql.store.end_key(&sql.elsewhere, &id, at(1)).await.expect("answers"), None);
    let unknown = KeyId::from_stored("key_x");
    assert_eq!(sql.store.end_key(&sql.here, &unknown, at(1)).await.expect("answers"), None);
    assert_eq!(sql.store.keys(&sql.here).await.expect("answers")[0].ends_at, Some(at(200)));
}

async fn every_change_of_a_key_advances_the_revision_for_every_process(sql: Sql) {
    let other = sql.again().await;
    let mut revisions = vec![sql.store.key_revision().await.expect("answers")];
    other.insert_key(key("key_a", &sql.here, 1)).await.expect("stored");
    revisions.push(sql.store.key_revision().await.expect("answers"));
    other.end_key(&sql.here, &KeyId::from_stored("key_a"), at(5)).await.expect("ended");
    revisions.push(sql.store.key_revision().await.expect("answers"));
    assert!(revisions.is_sorted_by(|a, b| a < b), "{revisions:?}");
    let inserts = (0..10).map(|n| {
        let (store, here) = (if n % 2 == 0 { &sql.store } else { &other }, &sql.here);
        async move { store.insert_key(key(&format!("key_{n}"), here, 1)).await.expect("stored") }
    });
    join_all(inserts).await;
    assert_eq!(sql.store.key_revision().await.expect("answers"), revisions[2] + 10);
}

async fn the_first_log_to_claim_the_store_keeps_it(sql: Sql) {
    let other = sql.again().await;
    let (a, b) = tokio::join!(sql.store.claim_log("log_a"), other.claim_log("log_b"));
    let (a, b) = (a.expect("answers"), b.expect("answers"));
    assert_eq!(a, b);
    assert_eq!(sql.store.claim_log("log_c").await.expect("answers"), a);
}

async fn rows_survive_closing_and_opening(sql: Sql) {
    let mine = sql.create(Session { tags: words(&["kept"]), ..named("mine") }).await.session;
    sql.store.close().await;
    let reopened = sql.again().await;
    let row = reopened.find_session(&sql.here, &mine.id.clone().into()).await.expect("answers");
    assert_eq!(row, Some(mine));
}

async fn a_ping_answers(sql: Sql) {
    sql.store.ping().await.expect("answers");
}

async fn a_row_that_cannot_be_read_is_named(sql: Sql) {
    let mine = sql.create(named("mine")).await.session;
    let raw = sql.database.connect().await;
    raw.execute_unprepared("UPDATE sessions SET metadata = '[1]'").await.expect("updates");
    let refused = sql.store.find_session(&sql.here, &mine.id.clone().into()).await;
    let Err(Error::Internal(source)) = refused else { panic!("must be refused: {refused:?}") };
    assert_eq!(source.to_string(), format!("cannot read sessions.metadata of row {}", mine.id));
}

async fn a_store_that_is_closed_is_unavailable(sql: Sql) {
    sql.store.close().await;
    for refused in [sql.store.ping().await, sql.store.insert_key(key("key_a", &sql.here, 1)).await] {
        assert!(matches!(refused, Err(Error::Unavailable { what: "metadata", .. })), "{refused:?}");
    }
}

async fn a_schema_from_a_newer_binary_is_refused(sql: Sql) {
    let raw = sql.database.connect().await;
    raw.execute_unprepared("INSERT INTO seaql_migrations (version, applied_at) VALUES ('m29990101_new', 1)")
        .await
        .expect("inserts");
    let opened = SqlMetadata::open(&sql.database.url, OpenOptions::default()).await;
    let Err(OpenError::NewerSchema { unknown }) = opened else { panic!("must be refused") };
    assert_eq!(unknown, ["m29990101_new"]);
    assert!(matches!(migrate(&sql.database.url).await, Err(OpenError::NewerSchema { .. })));
}

/// Cases that begin before there is a schema.
mod empty {
    use super::*;

    suite!("MetadataStore": [sqlite = sqlite, postgres = TestDatabase::postgres], [
        concurrent_starts_on_an_empty_database_all_succeed,
        migrating_reports_what_it_did,
    ]);

    async fn sqlite() -> TestDatabase {
        TestDatabase::sqlite()
    }

    async fn concurrent_starts_on_an_empty_database_all_succeed(database: TestDatabase) {
        let open = || async {
            let store = SqlMetadata::open(&database.url, OpenOptions::default()).await.expect("opens");
            store.key_revision().await.expect("answers")
        };
        assert_eq!(join_all((0..6).map(|_| open())).await, [0; 6]);
    }

    async fn migrating_reports_what_it_did(database: TestDatabase) {
        let first = migrate(&database.url).await.expect("migrates");
        assert_eq!((first.applied.as_slice(), first.already), (migration::Migrator::names().as_slice(), 0));
        let again = migrate(&database.url).await.expect("migrates");
        assert_eq!((again.applied.len(), again.already), (0, first.applied.len()));
    }
}

#[cfg(unix)]
#[tokio::test]
async fn files_of_sqlite_are_readable_by_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let sql = Sql::sqlite().await;
    sql.create(session(1)).await;
    let file = std::path::PathBuf::from(sql.database.url.trim_start_matches("sqlite:"));
    let folder = file.parent().expect("a folder");
    let modes = std::fs::read_dir(folder).expect("lists").map(|entry| {
        let mode = entry.expect("an entry").metadata().expect("its mode").permissions().mode();
        mode & 0o777
    });
    let modes: Vec<_> = modes.collect();
    assert_eq!(modes, [0o600; 3], "the file, its write-ahead log and the log's index");
}

#[tokio::test]
async fn a_url_of_no_known_database_is_refused() {
    for url in ["", "mysql://x", "sqlite:", "sqlite::memory:", "sqlite:a?mode=ro"] {
        let opened = SqlMetadata::open(url, OpenOptions::default()).await;
        assert!(matches!(opened, Err(OpenError::Url(_))), "{url}");
    }
}
