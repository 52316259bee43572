use bytes::Bytes;
use futures_util::future::FutureExt;

use super::*;
use crate::record::{METERED_MAX, ReadLimit, Record, RecordBatch};

#[tokio::test]
async fn a_connection_has_little_and_gets_more_as_it_earns() {
    let budget = SendBudget::new(64 << 20, 1);
    let connection = budget.connection();
    assert_eq!(connection.piece(), FIRST_PIECE);
    let first = connection.try_reserve(FIRST_BYTES).expect("room");
    assert!(connection.try_reserve(CREDIT_BYTES + 1).is_none(), "more than it may have");
    assert!(connection.reserve(1).now_or_never().is_none(), "more than it may have");
    drop(first);
    connection.took(UNREAD_BYTES as usize);
    assert_eq!(connection.piece(), FIRST_PIECE, "nobody need have read that");
    let little = connection.try_reserve(1).expect("room");
    assert!(connection.try_reserve(FIRST_BYTES).is_none(), "nobody need have read that");
    drop(little);
    connection.took(1 << 20);
    assert_eq!(connection.piece(), 256 << 10);
    let both = [connection.try_reserve(1 << 20), connection.try_reserve(FIRST_BYTES)];
    assert!(both.iter().all(Option::is_some), "as much as it has earned");
    assert_eq!(budget.lent(), (1 << 20) + FIRST_BYTES);
    drop(both);
    connection.took(1 << 30);
    assert_eq!(connection.piece(), METERED_MAX);
    assert_eq!(connection.try_reserve(usize::MAX).expect("room").bytes(), CONNECTION_BYTES);
    assert_eq!(budget.lent(), 0);
}

#[test]
fn one_large_piece_is_lent_to_a_connection_that_has_nothing_else() {
    let budget = SendBudget::new(64 << 20, 1);
    let connection = budget.connection();
    let large = connection.try_reserve(2 << 20).expect("room");
    assert_eq!((large.bytes(), budget.lent()), (2 << 20, 2 << 20));
    assert!(connection.try_reserve(1).is_none(), "it has something");
    let rest = large.around(Bytes::from_static(b"x"));
    assert_eq!(budget.lent(), COPIES);
    let piece = rest.slice(..1);
    drop(rest);
    assert_eq!(budget.lent(), COPIES, "a part of it lives");
    drop(piece);
    assert_eq!(budget.lent(), 0);
}

#[test]
fn what_is_written_longer_than_it_was_read_counts_too() {
    let budget = SendBudget::new(64 << 20, 1);
    let room = Arc::new(budget.connection().try_reserve(10).expect("room"));
    let bytes = holding_room(Bytes::from(vec![0; 1000]), room);
    assert_eq!(budget.lent(), 1000);
    drop(bytes);
    assert_eq!(budget.lent(), 0);
}

#[tokio::test]
async fn when_all_is_lent_the_one_that_has_taken_nothing_for_longest_is_cut() {
    let budget = SendBudget::new(CONNECTION_BYTES, 1);
    let (oldest, old, reads) = (budget.connection(), budget.connection(), budget.connection());
    let part = CONNECTION_BYTES / 4;
    for connection in [&oldest, &old, &reads] {
        connection.took(UNREAD_BYTES as usize + 2 * part);
    }
    let held = oldest.try_reserve(part).expect("room");
    sleep(Duration::from_millis(5)).await;
    let dripping = old.try_reserve(part).expect("room");
    let _read = reads.try_reserve(2 * part).expect("room");
    let live = budget.connection();
    live.took(UNREAD_BYTES as usize + 2 * part);
    assert!(live.try_reserve(CREDIT_BYTES).is_some(), "a little is lent to one that takes everything");
    let reading = async {
        // The last one goes on reading, all that it holds in ten seconds. The younger one takes a byte now and then.
        loop {
            sleep(RELIEF_EVERY).await;
            reads.took(2 * part / 100);
            old.took(1);
        }
    };
    let waiting = async {
        tokio::select! {
            () = oldest.cut() => drop(held),
            () = old.cut() => panic!("the younger one was cut first"),
        }
        old.cut().await;
        drop(dripping);
    };
    let next = live.reserve(2 * part);
    tokio::select! {
        (room, ()) = futures_util::future::join(next, waiting) => assert_eq!(room.bytes(), 2 * part),
        () = reading => unreachable!("for ever"),
        () = reads.cut() => panic!("one that reads was cut"),
    }
}

#[test]
fn who_has_taken_something_of_late_is_left_alone_however_much_it_holds() {
    let mut budget = SendBudget::new(CONNECTION_BYTES, 1);
    // Long ago, so that there is a moment which is out of patience.
    Arc::get_mut(&mut budget).expect("nobody else has it").began -= 2 * PATIENCE;
    let (still, reads) = (budget.connection(), budget.connection());
    let _held = still.try_reserve(1).expect("room");
    let _read = reads.try_reserve(CONNECTION_BYTES - 1).expect("room");
    still.connection.moved_at.store(0, Ordering::Relaxed);
    // Just now, however long this test is held up.
    reads.connection.moved_at.store(u64::MAX, Ordering::Relaxed);
    budget.relieve(Kind::Bytes);
    let is_cut = |budget: &ConnectionBudget| budget.connection.is_cut.load(Ordering::Relaxed);
    assert_eq!((is_cut(&still), is_cut(&reads)), (true, false));
}

#[tokio::test]
async fn who_waits_for_much_does_not_hold_up_who_wants_little() {
    let budget = SendBudget::new(64 << 20, 1);
    let connections: Vec<_> = (0..9).map(|_| budget.connection()).collect();
    let mut large: Vec<_> =
        connections.iter().map(|connection| Box::pin(connection.reserve(CONNECTION_BYTES))).collect();
    let lent: Vec<_> = large.iter_mut().map(FutureExt::now_or_never).collect();
    assert_eq!(
        lent.iter().flatten().count(),
        6,
        "as many as fit into three eighths, with what each has anyway"
    );
    let little = budget.connection();
    assert!(little.reserve(FIRST_BYTES).now_or_never().is_some());
}

#[tokio::test]
async fn two_thousand_that_take_nothing_leave_room_for_those_that_do() {
    let budget = SendBudget::new(224 << 20, 1);
    let healthy = budget.connection();
    healthy.took(8 << 20);
    let stuck: Vec<_> = (0..2000).map(|_| budget.connection()).collect();
    let held: Vec<_> = stuck
        .iter()
        .filter_map(|connection| {
            // What the kernel takes. Every fifth waits for a large answer, the others for a piece each.
            connection.took(UNREAD_BYTES as usize);
            let most = if connection.connection.number % 5 == 0 { CONNECTION_BYTES } else { FIRST_BYTES };
            connection.reserve(most).now_or_never()
        })
        .collect();
    assert!(held.len() > 1600 && budget.large_advances.free.available_permits() < CONNECTION_BYTES);
    for (fresh, bytes) in [(budget.connection(), FIRST_BYTES), (budget.connection(), LARGE_ADVANCE)] {
        assert!(
            fresh.reserve(bytes).now_or_never().is_some(),
            "one that begins, with a large record or without"
        );
    }
    assert!(healthy.reserve(2 * METERED_MAX).now_or_never().is_some(), "one that reads on");
}

/// Lets so much time pass that whoever holds something and has not moved is stuck.
async fn patience_ends() {
    sleep(PATIENCE + Duration::from_millis(50)).await;
}

#[tokio::test(start_paused = true)]
async fn what_the_server_works_on_is_not_stuck_before_its_answer_waits_for_the_client() {
    let budget = SendBudget::new(CONNECTION_BYTES, 1);
    let connection = budget.connection();
    let mut room = connection.try_reserve(FIRST_BYTES).expect("room").at_work();
    patience_ends().await;
    budget.relieve(Kind::Bytes);
    assert!(connection.cut().now_or_never().is_none(), "it is the server that takes its time");
    room.grow(1000).await;
    patience_ends().await;
    budget.relieve(Kind::Bytes);
    assert!(connection.cut().now_or_never().is_some(), "the client does not take the answer");
}

#[tokio::test(start_paused = true)]
async fn who_has_no_advance_is_not_cut_to_make_room_for_one() {
    let budget = SendBudget::new(CONNECTION_BYTES, 1);
    let [little, large] = [(); 2].map(|()| budget.connection());
    let _little = little.try_reserve(FIRST_BYTES).expect("room");
    sleep(Duration::from_millis(5)).await;
    let _large = large.try_reserve(CONNECTION_BYTES / 2).expect("room");
    patience_ends().await;
    budget.relieve(Kind::LargeAdvances);
    assert!(little.cut().now_or_never().is_none(), "it would free none");
    assert!(large.cut().now_or_never().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_download_of_which_nothing_is_counted_can_be_cut() {
    let budget = SendBudget::new(CONNECTION_BYTES, 1);
    let connection = budget.connection();
    let _place = connection.download().await.expect("a place");
    patience_ends().await;
    budget.relieve(Kind::Downloads);
    assert!(connection.cut().now_or_never().is_some());
}

#[test]
fn pings_do_not_use_up_what_a_client_may_send() {
    let connection = SendBudget::new(64 << 20, 1).connection();
    connection.give_back(6);
    assert!(connection.spend(1 << 30), "nobody has set a limit");
    connection.allow(100, 0);
    for _ in 0..1000 {
        assert!(connection.spend(6));
        connection.give_back(6);
    }
    assert!(connection.spend(100) && connection.is_spent());
    connection.give_back(6);
    assert!(connection.is_spent() && !connection.spend(1), "what is over is over");
}

#[tokio::test]
async fn what_is_lent_to_whom_nobody_polls_counts_as_held() {
    let budget = SendBudget::new(CONNECTION_BYTES, 1);
    let [first, stopped, third] = [(); 3].map(|()| budget.connection());
    let held = first.try_reserve(CONNECTION_BYTES).expect("room");
    let mut waiting = Box::pin(stopped.reserve(CONNECTION_BYTES));
    assert!(futures_util::poll!(&mut waiting).is_pending());
    drop(held);
    while budget.lent() == 0 || stopped.connection.held.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    let cut = async {
        stopped.cut().await;
        drop(waiting);
    };
    let both = futures_util::future::join(third.reserve(CONNECTION_BYTES), cut);
    let (room, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("room is made");
    assert_eq!(room.bytes(), CONNECTION_BYTES);
}

#[tokio::test]
async fn a_download_that_does_not_move_makes_place_for_the_next() {
    let budget = SendBudget::new(CONNECTION_BYTES, 2 * CONNECTION_DOWNLOADS);
    let [stuck, moves, third] = [(); 3].map(|()| budget.connection());
    let mut places = Vec::new();
    for connection in [&stuck, &moves] {
        for _ in 0..CONNECTION_DOWNLOADS {
            places.push(connection.download().now_or_never().flatten().expect("a place"));
        }
        assert!(connection.download().now_or_never().is_none(), "more than one connection may have");
    }
    let _waits = [stuck.try_reserve(FIRST_BYTES), moves.try_reserve(FIRST_BYTES)].map(Option::unwrap);
    let rest = places.split_off(CONNECTION_DOWNLOADS);
    let reading = async {
        loop {
            sleep(RELIEF_EVERY).await;
            moves.took(FIRST_BYTES);
        }
    };
    let cut = async {
        tokio::select! {
            () = stuck.cut() => drop(places),
            () = moves.cut() => panic!("one that reads was cut"),
        }
    };
    tokio::select! {
        (place, ()) = futures_util::future::join(third.download(), cut) => assert!(place.is_some()),
        () = reading => unreachable!("for ever"),
    }
    drop(rest);
}

#[tokio::test]
async fn an_answer_waits_for_the_room_of_its_whole_length() {
    let budget = SendBudget::new(CONNECTION_BYTES, 1);
    let (answered, other) = (budget.connection(), budget.connection());
    let mut room = answered.try_reserve(1).expect("room");
    let rest = other.try_reserve(CONNECTION_BYTES - 1).expect("room");
    assert!(room.grow(1000).now_or_never().is_none(), "there is no room");
    drop(rest);
    room.grow(1000).await;
    assert_eq!((room.bytes(), budget.lent()), (COPIES * 1000, COPIES * 1000));
}

#[test]
fn what_is_given_up_counts_as_taken_no_further_than_something_was_sent() {
    let budget = SendBudget::new(64 << 20, 1);
    let connection = budget.connection();
    let room = |bytes: usize| connection.try_reserve(bytes).is_some();
    let _holds = connection.try_reserve(1).expect("room");
    connection.sent(UNREAD_BYTES as usize);
    connection.landed(UNREAD_BYTES as usize + (1 << 20));
    assert!(!room(FIRST_BYTES), "nothing was sent");
    connection.sent(100);
    connection.landed(1);
    assert!(room(FIRST_BYTES + 99) && !room(FIRST_BYTES + 100));
    connection.sent(1 << 20);
    connection.landed(99);
    assert!(room(FIRST_BYTES + (1 << 20) + 99) && !room(FIRST_BYTES + (1 << 20) + 100));
}

#[tokio::test]
async fn a_record_larger_than_the_piece_is_read_again_in_its_own_room() {
    let budget = SendBudget::new(64 << 20, 1);
    let connection = budget.connection();
    let batch = |size: usize| {
        let record = Record {
            position: crate::Position::default(),
            headers: Vec::new(),
            body: vec![b'x'; size].into(),
            metered_end: 0,
        };
        Arc::new(RecordBatch::new(vec![record], None))
    };
    let asked = Mutex::new(Vec::new());
    let read = |limit: ReadLimit| {
        lock(&asked).push((limit.count, budget.lent()));
        std::future::ready(Ok(batch(500_000)))
    };
    let delivery = connection.read(read).await.expect("reads");
    let needed = cost(&delivery.records);
    assert!(needed > 1_000_000);
    assert_eq!(*lock(&asked), [(64, 2 * FIRST_PIECE + 64 * RECORD_BYTES), (1, needed)]);
    drop(delivery);
    assert_eq!(budget.lent(), 0);
}
