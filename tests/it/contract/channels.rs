//! The channels contract. Uses the port alone, so that every engine can pass it unchanged; time is only
//! compared with time that the engine itself gave.

mod append;
mod follow;
mod idempotency;
mod read;
mod seal;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use sessiond::domain::channel::ChannelName;
use sessiond::domain::close;
use sessiond::domain::port::Followed;
use sessiond::domain::record::{Chain, Command, PartIds, RESEND_WINDOW, ReadLimit};
use sessiond::domain::{
    AppendAck, AppendInput, ChannelAddress, ChannelKey, ChannelStore, Close, Closure, Direction, Error,
    NewRecord, ReadStart, Record, RecordBatch, Result, SessionId, SystemClock, Timestamp,
};
use sessiond::store::channel::log::{LogChannels, LogOptions};

use super::suite;
use crate::harness;
use append::*;
use follow::*;
use idempotency::*;
use read::*;
use seal::*;

/// An adapter and what must outlive it.
struct Channels {
    store: Arc<dyn ChannelStore>,
    _guard: Box<dyn Any + Send + Sync>,
}

async fn open_log() -> Channels {
    let folder = tempfile::tempdir().expect("a folder");
    let log = LogChannels::open(folder.path(), LogOptions::default(), Arc::new(SystemClock)).expect("opens");
    Channels { store: Arc::new(log), _guard: Box::new(folder) }
}

async fn open_s2() -> Channels {
    let store = harness::s2_lite::open(&harness::s2_lite::endpoint(), &harness::s2_lite::fresh_basin()).await;
    Channels { store, _guard: Box::new(()) }
}

/// A channel of a session that no other case knows.
fn channel() -> ChannelKey {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    ChannelKey::main(SessionId::from_stored(&format!("session_contract{number}")), Direction::Out)
}

fn side(key: &ChannelKey, direction: Direction, name: Option<&str>) -> ChannelKey {
    let name = name.map(|name| ChannelName::parse(name).expect("valid"));
    ChannelKey { session: key.session.clone(), address: ChannelAddress { direction, name } }
}

fn data(bodies: &[&str]) -> AppendInput {
    AppendInput::new(bodies.iter().map(|body| NewRecord::data(body.to_string())).collect()).expect("fits")
}

fn part(id: &str, body: &str) -> NewRecord {
    NewRecord { part_id: Some(id.into()), ..NewRecord::data(body.to_owned()) }
}

fn command(command: Command) -> AppendInput {
    AppendInput::one(command.into_record()).expect("fits")
}

fn expecting(seq_num: u64, mut input: AppendInput) -> AppendInput {
    input.match_seq_num = Some(seq_num);
    input
}

fn fenced(token: &str, mut input: AppendInput) -> AppendInput {
    input.fencing_token = Some(token.to_owned());
    input
}

fn closure(reason: &str) -> Closure {
    Closure { at: Timestamp::from_millis(1_700_000_000_000), reason: Some(reason.to_owned()) }
}

fn bodies(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| String::from_utf8_lossy(&record.body).into_owned()).collect()
}

impl Channels {
    async fn append(&self, key: &ChannelKey, input: AppendInput) -> AppendAck {
        self.store.append(key, input).await.expect("appends")
    }

    async fn refused(&self, key: &ChannelKey, input: AppendInput) -> Error {
        self.store.append(key, input).await.expect_err("is refused")
    }

    async fn read(&self, key: &ChannelKey, start: ReadStart, limit: ReadLimit) -> Arc<RecordBatch> {
        self.store.read(key, start, limit).await.expect("reads")
    }

    async fn all(&self, key: &ChannelKey) -> Vec<String> {
        bodies(&self.read(key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.records)
    }

    async fn tail(&self, key: &ChannelKey) -> u64 {
        self.store.bounds(key).await.expect("bounds").tail.seq_num
    }

    async fn follow(&self, key: &ChannelKey, start: ReadStart) -> Follower {
        Follower(self.store.follow(key, start, &harness::ample_budget()).await.expect("follows"))
    }
}

/// A follower whose next event is waited for, but not for ever.
struct Follower(BoxStream<'static, Result<Followed>>);

impl Follower {
    async fn next(&mut self) -> Option<Followed> {
        let next = tokio::time::timeout(std::time::Duration::from_secs(20), self.0.next());
        next.await.expect("an event before the test gives up").transpose().expect("no fault")
    }

    async fn batch(&mut self) -> Arc<RecordBatch> {
        match self.next().await {
            Some(Followed::Batch(batch)) => batch.batch().clone(),
            other => panic!("expected a batch, got {other:?}"),
        }
    }

    async fn caught_up(&mut self) -> u64 {
        match self.next().await {
            Some(Followed::CaughtUp(tail)) => tail.seq_num,
            other => panic!("expected to be caught up, got {other:?}"),
        }
    }

    /// Records until `count` of them have come; other events are skipped.
    async fn records(&mut self, count: usize) -> Vec<Record> {
        let mut records = Vec::new();
        while records.len() < count {
            match self.next().await.expect("more records") {
                Followed::Batch(batch) => records.extend(batch.records.iter().cloned()),
                Followed::CaughtUp(_) | Followed::Behind => {}
                Followed::Sealed(_) => panic!("sealed after {} records", records.len()),
            }
        }
        records
    }

    async fn sealed(&mut self) -> Closure {
        match self.next().await {
            Some(Followed::Sealed(closure)) => closure,
            other => panic!("expected the end, got {other:?}"),
        }
    }
}

suite!("ChannelStore": [log = open_log, s2 = open_s2], [
    a_channel_exists_as_soon_as_it_is_named,
    sequence_numbers_start_at_zero_and_an_ack_names_every_place,
    concurrent_appends_get_gapless_numbers,
    concurrent_batches_are_never_interleaved,
    appends_are_stored_in_the_order_in_which_they_were_made,
    an_append_that_nobody_waits_for_is_stored,
    behind_a_refused_append_of_a_chain_nothing_is_stored,
    a_refused_batch_leaves_nothing_behind,
    the_expected_sequence_number_is_compared_and_set,
    of_many_writers_that_expect_the_same_tail_one_wins,
    a_fence_refuses_other_tokens_and_tells_the_right_one,
    an_append_without_a_token_passes_a_fence,
    an_empty_fence_lifts_it,
    the_fence_is_checked_before_the_sequence_number,
    commands_of_one_batch_act_in_order,
    a_trim_is_visible_at_once_and_takes_a_number,
    a_trim_backwards_changes_nothing_but_takes_a_number,
    a_trim_past_the_tail_trims_everything,
    control_and_command_records_come_back_as_they_were,
    times_never_run_backwards_or_ahead,
    metered_ends_grow_by_no_less_than_each_record,
    the_largest_record_comes_back_whole,
    sessions_directions_and_side_channels_are_separate_logs,
    reads_start_at_a_number,
    reads_below_the_trim_point_start_at_the_first_survivor,
    reads_past_the_tail_are_empty_and_tell_it,
    reads_start_at_an_offset_from_the_tail,
    reads_start_at_a_time,
    reads_end_at_a_count,
    reads_end_at_a_size_but_bring_at_least_one_record,
    only_a_read_that_reached_the_tail_tells_it,
    a_repeat_answers_the_original_place,
    a_known_part_id_with_another_content_is_refused,
    headers_are_part_of_the_content,
    part_ids_belong_to_one_channel,
    a_known_batch_is_repeated_and_a_partly_known_one_refused,
    concurrent_repeats_store_one_record,
    a_repeat_passes_a_fence_and_a_moved_tail,
    a_refused_append_does_not_use_its_part_id_up,
    a_recent_batch_sent_again_is_stored_once,
    a_recent_part_id_that_comes_again_by_chance_is_stored,
    the_first_seal_holds,
    of_many_seals_one_holds,
    a_sealed_session_takes_no_append_not_even_a_repeat,
    the_main_channels_end_with_what_tells_of_the_close,
    a_close_that_was_told_is_not_told_again,
    of_two_hundred_closes_one_is_told,
    a_seal_covers_channels_that_were_never_written,
    a_seal_leaves_other_sessions_alone,
    no_append_is_acknowledged_behind_a_seal,
    seals_are_unsettled_until_they_are_settled,
    followers_get_stored_records_then_live_ones,
    followers_start_in_the_middle_at_the_tail_and_past_it,
    followers_below_the_trim_point_start_at_the_first_survivor,
    followers_of_an_unwritten_channel_get_its_first_record,
    followers_share_a_live_batch,
    followers_of_a_sealed_session_get_the_rest_and_the_end,
    waiting_followers_of_every_channel_see_the_seal,
    a_slow_follower_skips_and_repeats_nothing,
    followers_among_concurrent_writers_see_every_record_once,
    a_dropped_follower_holds_nothing_up,
    the_log_says_that_it_is_well,
]);
