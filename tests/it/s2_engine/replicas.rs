//! Replicas on one basin: each sees at once what the others did.

use futures_util::future::join_all;
use s2_sdk::types::{
    AppendInput as S2Append, AppendRecord, AppendRecordBatch, BasinConfig, CommandRecord, CreateBasinInput,
    EnsureStreamInput, Header, S2Config, S2Endpoints,
};
use s2_sdk::{S2, S2Basin};
use sessiond::domain::close;
use sessiond::domain::record::Command;
use sessiond::domain::{AppendAck, Error, SystemClock};
use sessiond::store::channel::s2::OpenError;

use super::*;
use crate::harness::s2_lite::options;

/// S2 without us, to leave things as a process that died would have.
fn account() -> S2 {
    let endpoints = S2Endpoints::for_endpoint(&endpoint()).expect("an endpoint");
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let config = S2Config::new("ignored").with_endpoints(endpoints).with_rustls_crypto_provider(provider);
    S2::new(config).expect("a client")
}

fn raw(basin: &str) -> S2Basin {
    account().basin(basin.parse().expect("a name"))
}

async fn put(basin: &S2Basin, stream: &str, records: Vec<AppendRecord>) {
    let ensure = EnsureStreamInput::new(stream.parse().expect("a name"));
    basin.ensure_stream(ensure).await.expect("a stream");
    let batch = AppendRecordBatch::try_from_iter(records).expect("fits");
    basin.stream(stream.parse().expect("a name")).append(S2Append::new(batch)).await.expect("appends");
}

fn json(text: &str) -> AppendRecord {
    AppendRecord::new(text.to_owned()).expect("fits")
}

fn seal() -> AppendRecord {
    CommandRecord::fence("sessiond:sealed".parse().expect("a token")).into()
}

fn is_closed(answer: &Result<AppendAck>, reason: &str) -> bool {
    matches!(answer, Err(Error::Closed { reason: Some(given), .. }) if given == reason)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_replicas_that_expect_the_same_tail_one_wins_every_time() {
    let [a, b] = two().await;
    let key = main_out("cas");
    let mut wins = [0, 0];
    for turn in 0..50 {
        let attempt = |who: &str| {
            let mut input = data(&format!("{who} {turn}"));
            input.match_seq_num = Some(turn);
            input
        };
        let (of_a, of_b) = tokio::join!(a.append(&key, attempt("a")), b.append(&key, attempt("b")));
        wins[0] += usize::from(of_a.is_ok());
        wins[1] += usize::from(of_b.is_ok());
        for lost in [of_a, of_b].into_iter().filter_map(Result::err) {
            assert!(matches!(lost, Error::SeqNumMismatch { tail } if tail == turn + 1), "{lost:?}");
        }
    }
    assert_eq!(wins[0] + wins[1], 50, "{wins:?}");
    assert_eq!(all(&a, &key).await.len(), 50);
}

/// Appends as clients do: once more when S2 was too busy to answer.
async fn persist(replica: &S2Channels, key: &ChannelKey, input: AppendInput) -> AppendAck {
    loop {
        match replica.append(key, input.clone()).await {
            Err(Error::Unavailable { .. }) => {}
            answer => return answer.expect("appends"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_id_is_stored_once_by_whichever_replica_comes_first() {
    let [a, b] = two().await;
    let key = main_out("parts");
    let appends = (0..60).flat_map(|number| {
        // The same parts through both, and others in between.
        let (id, noise) = (format!("p{number}"), format!("noise{number}"));
        [(&a, part(&id, "x")), (&b, part(&noise, "noise")), (&b, part(&id, "x"))]
    });
    let acks = join_all(appends.map(|(replica, input)| persist(replica, &key, input))).await;
    for three in acks.chunks(3) {
        assert_eq!(three[0].seq_nums, three[2].seq_nums);
        assert!(three[0].repeated || three[2].repeated, "one of two has stored it");
    }
    assert_eq!(all(&b, &key).await.len(), 120);
    let other = b.append(&key, part("p7", "other")).await;
    assert!(matches!(other, Err(Error::IdempotencyMismatch { .. })), "{other:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_direct_batch_sent_again_is_known_to_a_new_replica_but_only_among_the_last_records() {
    let (endpoint, basin, key) = (endpoint(), fresh_basin(), main_out("direct"));
    let a = open(&endpoint, &basin).await;
    let first = a.append(&key, direct("abc1234", "x")).await.expect("appends");
    let b = open(&endpoint, &basin).await;
    let again = b.append(&key, direct("abc1234", "x")).await.expect("is known");
    assert!(again.repeated && again.seq_nums == first.seq_nums);
    assert!(!b.append(&key, direct("abc1234", "y")).await.expect("is another").repeated);
    let filler = AppendInput::new(vec![NewRecord::data("z"); 1000]).expect("fits");
    a.append(&key, filler).await.expect("appends");
    for replica in [b, open(&endpoint, &basin).await] {
        let late = replica.append(&key, direct(&uuid::Uuid::new_v4().simple().to_string(), "x")).await;
        assert!(!late.expect("appends").repeated);
    }
    let chance = open(&endpoint, &basin).await.append(&key, direct("abc1234", "x")).await.expect("appends");
    assert!(!chance.repeated, "it stands too far back to be the same batch");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_replica_appends_the_other_reads_and_follows() {
    let [a, b] = two().await;
    for key in [main_out("both"), named("both", "side")] {
        let mut follower = Follower::of(&b, &key).await;
        for turn in 0..20 {
            let writer = if turn % 2 == 0 { &a } else { &b };
            let ack = writer.append(&key, data(&turn.to_string())).await.expect("appends");
            assert_eq!(ack.start.seq_num, turn);
            assert_eq!(b.bounds(&key).await.expect("bounds").tail.seq_num, turn + 1);
        }
        assert_eq!(bodies(&follower.records(20).await), (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
    }
    assert_eq!(b.followed_channels(), 0, "a channel nobody follows is not followed in S2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_through_one_replica_refuses_every_writer_of_the_other_at_once() {
    let [a, b] = two().await;
    let keys = [main_out("close"), named("close", "one"), named("close", "two")];
    for key in &keys {
        b.append(key, data("first")).await.expect("appends");
    }
    let mut follower = Follower::of(&b, &keys[1]).await;
    let mut unwritten = Follower::of(&b, &named("close", "never")).await;
    a.seal(&session("close"), closure("done").into()).await.expect("seals");
    let ends = close::output_record(&closure("done"));
    for key in keys.iter().chain([&named("close", "new"), &ChannelKey::main(session("close"), Direction::In)])
    {
        let refused = b.append(key, data("late")).await;
        assert!(is_closed(&refused, "done"), "{key}: {refused:?}");
        assert!(is_closed(&b.append(key, part("p", "late")).await, "done"));
        let read = all(&b, key).await;
        let told = usize::from(key.address.name.is_none());
        assert!(read.len() <= 1 + told);
        assert!(told == 0 || key.address.direction == Direction::In || read[1].headers == ends.headers);
    }
    assert_eq!(follower.drain().await.1, closure("done"));
    assert_eq!(unwritten.drain().await, (vec![], closure("done")));
    assert_eq!(b.seal(&session("close"), closure("later").into()).await.expect("seals"), closure("done"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_append_of_any_replica_is_acknowledged_behind_a_seal() {
    let [a, b] = two().await;
    for round in 0..5 {
        let name = format!("race{round}");
        let keys = [main_out(&name), named(&name, "side")];
        let writers = [&a, &b].into_iter().flat_map(|replica| {
            keys.iter().map(|key| {
                let (replica, key) = (replica.clone(), key.clone());
                tokio::spawn(async move {
                    let mut acked = Vec::new();
                    while let Ok(ack) = replica.append(&key, data("a")).await {
                        acked.push(ack.start.seq_num);
                    }
                    (key, acked)
                })
            })
        });
        let writers: Vec<_> = writers.collect();
        Follower::of(&a, &keys[0]).await.records(30).await;
        a.seal(&session(&name), closure("done").into()).await.expect("seals");
        let tails: Vec<_> = join_all(keys.iter().map(|key| b.bounds(key))).await;
        let mut acked = [Vec::new(), Vec::new()];
        for writer in writers {
            let (key, places) = writer.await.expect("writes");
            acked[usize::from(key != keys[0])].extend(places);
        }
        for ((key, tail), mut acked) in keys.iter().zip(tails).zip(acked) {
            acked.sort_unstable();
            let tail = tail.expect("bounds").tail.seq_num;
            if key.address.name.is_none() {
                // What tells of the close.
                acked.push(tail - 1);
            }
            assert_eq!(acked, (0..tail).collect::<Vec<_>>(), "{key}");
            assert_eq!(places(&all(&a, key).await), acked);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seal_whose_process_died_is_finished_by_whoever_meets_it() {
    let (endpoint, basin) = (endpoint(), fresh_basin());
    let replica = open(&endpoint, &basin).await;
    let keys = [main_out("half"), named("half", "side")];
    for key in &keys {
        replica.append(key, data("first")).await.expect("appends");
    }
    // Announced, decided, and then nothing more.
    let s2 = raw(&basin);
    put(&s2, "sessiond/unsettled", vec![json(r#"{"sealing":"session_half"}"#)]).await;
    let closed = r#"{"closed":{"at":1700000000000,"reason":"died"}}"#;
    put(&s2, "sessions/session_half/registry", vec![json(closed), seal()]).await;
    let [new, old] = [named("half", "new"), keys[1].clone()];
    assert!(is_closed(&replica.append(&new, data("late")).await, "died"));
    for key in keys.iter().chain([&old]) {
        assert!(is_closed(&replica.append(key, data("late")).await, "died"), "{key}");
    }
    let restarted = open(&endpoint, &basin).await;
    assert_eq!(restarted.unsettled().await.expect("lists"), [(session("half"), closure("died"))]);
    assert_eq!(
        restarted.seal(&session("half"), closure("again").into()).await.expect("seals"),
        closure("died")
    );
    restarted.settle(&session("half")).await.expect("settles");
    assert!(replica.unsettled().await.expect("lists").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_whatever_step_a_close_is_broken_off_each_channel_tells_of_it_once() {
    let (endpoint, basin) = (endpoint(), fresh_basin());
    let replica = open(&endpoint, &basin).await;
    let s2 = raw(&basin);
    for (step, [input_done, output_done]) in
        [[false, false], [true, false], [false, true], [true, true]].into_iter().enumerate()
    {
        let name = format!("step{step}");
        let session = session(&name);
        let (input, output) = (ChannelKey::main(session.clone(), Direction::In), main_out(&name));
        for key in [&input, &output] {
            replica.append(key, data("first")).await.expect("appends");
        }
        let closed = r#"{"closed":{"at":1700000000000,"reason":"died"}}"#;
        put(&s2, &format!("sessions/{session}/registry"), vec![json(closed), seal()]).await;
        let record = |new: NewRecord| {
            let headers = new.headers.into_iter().map(|(name, value)| Header::new(name, value));
            AppendRecord::new(new.body).and_then(|body| body.with_headers(headers)).expect("a record")
        };
        let died = closure("died");
        let (last_in, last_out) = (close::input_record(&session), close::output_record(&died));
        if input_done {
            put(&s2, &input.to_string(), vec![record(last_in.clone()), seal()]).await;
        }
        if output_done {
            put(&s2, &output.to_string(), vec![record(last_out.clone()), seal()]).await;
        }
        // Two at once find it, and a third looks later.
        let [one, two] = [open(&endpoint, &basin).await, open(&endpoint, &basin).await];
        let again = || closure("again").into();
        let (one_held, two_held) = tokio::join!(one.seal(&session, again()), two.seal(&session, again()));
        assert_eq!((one_held.expect("held"), two_held.expect("held")), (died.clone(), died));
        for reader in [one, two, open(&endpoint, &basin).await] {
            for (key, last) in [(&input, &last_in), (&output, &last_out)] {
                let read = all(&reader, key).await;
                let shown: Vec<_> = read.iter().map(|record| (&record.headers, &record.body)).collect();
                let first = NewRecord::data("first");
                assert_eq!(
                    shown,
                    [(&first.headers, &first.body), (&last.headers, &last.body)],
                    "{step} {key}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_announced_seal_that_was_never_made_closes_nothing() {
    let (endpoint, basin) = (endpoint(), fresh_basin());
    let replica = open(&endpoint, &basin).await;
    put(&raw(&basin), "sessiond/unsettled", vec![json(r#"{"sealing":"session_open"}"#)]).await;
    assert!(replica.unsettled().await.expect("lists").is_empty());
    replica.append(&main_out("open"), data("a")).await.expect("is open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settled_seals_are_forgotten_and_open_ones_kept() {
    let [a, b] = two().await;
    let names: Vec<_> = (0..150).map(|number| session(&format!("many{number}"))).collect();
    // Many at once, because one after another takes half a minute.
    let ends = names.iter().enumerate().map(|(index, session)| {
        let a = &a;
        async move {
            a.seal(session, closure("done").into()).await.expect("seals");
            if index != 100 {
                a.settle(session).await.expect("settles");
            }
        }
    });
    futures_util::stream::iter(ends).for_each_concurrent(30, |end| end).await;
    for replica in [&a, &b] {
        assert_eq!(replica.unsettled().await.expect("lists"), [(names[100].clone(), closure("done"))]);
    }
    b.settle(&names[100]).await.expect("settles");
    assert!(a.unsettled().await.expect("lists").is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fences_and_trims_of_one_replica_hold_for_the_other() {
    let [a, b] = two().await;
    let key = main_out("fence");
    b.append(&key, data("a")).await.expect("appends");
    let fence = AppendInput::one(Command::Fence("mine".into()).into_record()).expect("fits");
    a.append(&key, fence).await.expect("fences");
    let with = |token: &str| {
        let mut input = data("b");
        input.fencing_token = Some(token.to_owned());
        input
    };
    let refused = b.append(&key, with("yours")).await;
    assert!(matches!(&refused, Err(Error::Fenced { expected }) if expected == "mine"), "{refused:?}");
    b.append(&key, data("without")).await.expect("passes");
    b.append(&key, with("mine")).await.expect("passes");
    a.append(&key, AppendInput::one(Command::Trim(2).into_record()).expect("fits")).await.expect("trims");
    assert_eq!(b.bounds(&key).await.expect("bounds").earliest, 2);
    assert_eq!(places(&all(&b, &key).await), [2, 3, 4]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_engine_keeps_for_itself_nobody_may_write() {
    let [a, _] = two().await;
    let key = main_out("reserved");
    let seal = "sessiond:sealed";
    let fence = AppendInput::one(Command::Fence(seal.into()).into_record()).expect("fits");
    let mut sealed = data("x");
    sealed.fencing_token = Some(seal.to_owned());
    let headers = vec![("sessiond-part-id".into(), "p".into())];
    let header = AppendInput::one(NewRecord { headers, ..NewRecord::data("x") }).expect("fits");
    for input in [fence, sealed, header] {
        let refused = a.append(&key, input).await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    }
    a.seal(&key.session, closure("done").into()).await.expect("seals");
    let mut sealed = data("x");
    sealed.fencing_token = Some(seal.to_owned());
    assert!(a.append(&key, sealed).await.is_err());
    assert_eq!(all(&a, &key).await.len(), 1, "what tells of the close");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_basin_has_one_log_id_and_may_not_make_streams_by_itself() {
    let (endpoint, basin) = (endpoint(), fresh_basin());
    let opened = join_all((0..4).map(|_| open(&endpoint, &basin))).await;
    assert!(opened.iter().all(|replica| replica.log_id() == opened[0].log_id()));
    assert_ne!(open(&endpoint, &fresh_basin()).await.log_id(), opened[0].log_id());
    let eager = fresh_basin();
    let config = BasinConfig::new().with_create_stream_on_append(true);
    let create = CreateBasinInput::new(eager.parse().expect("a name")).with_config(config);
    account().create_basin(create).await.expect("a basin");
    let refused = S2Channels::open(options(&endpoint, &eager), Arc::new(SystemClock)).await;
    assert!(matches!(refused, Err(OpenError::AutoCreate(_))), "{refused:?}");
}
