//! Postgres servers that are put back to what they were, and slots that are lost: ClickHouse is made the same again under a new
//! epoch, without a hand.

use tokio::process::Child;

use super::compare::Differences;
use super::service::Installation;
use super::writers::Writer;
use super::*;
use crate::harness::clickhouse::{self, Engine};
use crate::harness::postgres_server::{PostgresServer, Shutdown};
use crate::harness::replication::{drop_slot, flushed};

/// Rows that change in each stretch of a server's history.
const CHANGES: usize = 1_000;
/// Turns of a writer in which at least they do, because some of these change many rows.
const TURNS: usize = 200;

/// A Postgres of its own, and a replicator that runs whatever becomes of it.
struct Restorable {
    postgres: PostgresServer,
    sql: Sql,
    slot: Slot,
    here: Installation,
    replicator: Option<Child>,
}

impl Restorable {
    /// With sessions that have come to the ClickHouse of all tests.
    async fn start(settings: &[&str]) -> Self {
        Self::start_with(&clickhouse::url(), settings).await
    }

    /// With sessions that have come to a ClickHouse.
    async fn start_with(engine: &str, settings: &[&str]) -> Self {
        let postgres = PostgresServer::start(settings).await;
        let sql = Sql::at(&postgres.url()).await;
        let slot = Slot::named(&sql).await;
        let here = Installation {
            postgres: sql.database.url.clone(),
            clickhouse: clickhouse::connect(clickhouse::options(engine)),
            slot: slot.name.clone(),
            url: engine.to_owned(),
            data: tempfile::tempdir().expect("a folder"),
        };
        let replicator = Some(here.replicate());
        let this = Self { postgres, sql, slot, here, replicator };
        this.change(1).await;
        this.same_above(0).await;
        this
    }

    /// Changes that no other seed makes, to the same sessions and to new ones.
    async fn change(&self, seed: u64) {
        let mut writer = Writer::new(&self.sql, seed, "restored").await;
        let (mut changes, mut turns) = (0, 0);
        while changes < CHANGES || turns < TURNS {
            changes += writer.change().await.expect("a change");
            turns += 1;
        }
    }

    /// Waits until all is well under an epoch above this one, and all that was committed is stored; checks that both sides are the
    /// same, and says under which epoch.
    async fn same_above(&self, epoch: u64) -> u64 {
        let is_well = |seen: &Value| {
            let is_newer = seen["epoch"].as_u64().is_some_and(|now| now > epoch);
            is_newer && seen["phase"] == "streaming" && seen["problems"] == json!([])
        };
        let seen = self.here.wait_for("all is well", is_well).await;
        let place = flushed(&self.slot.connection).await;
        self.slot.wait_for(&format!("confirmed_flush_lsn >= '{place}'")).await;
        let differences = Differences::between(&self.slot.connection, &self.here.clickhouse).await;
        assert_eq!(differences, Differences::default());
        seen["epoch"].as_u64().expect("an epoch")
    }

    /// The slot is dropped, whoever reads it; what changes then is copied with everything else. Returns the new epoch.
    async fn begin_anew(&self, epoch: u64) -> u64 {
        drop_slot(&self.here.postgres, &self.here.slot).await;
        self.change(epoch + 100).await;
        self.same_above(epoch).await
    }

    async fn end(mut self) {
        if let Some(mut replicator) = self.replicator.take() {
            assert_eq!(replicator.try_wait().expect("a child"), None, "it has run all the time");
            replicator.kill().await.expect("killed");
        }
        self.postgres.stop(Shutdown::Immediate).await;
    }
}

/// What has become of a server before it is what it was again.
#[derive(Clone, Copy)]
enum Meanwhile {
    /// Changes, which came to ClickHouse.
    Changes,
    /// Changes, and replication began anew.
    Epoch,
}

impl Meanwhile {
    /// Lets it happen after epoch 1; the epoch then.
    async fn happen(self, server: &Restorable) -> u64 {
        server.change(2).await;
        let epoch = server.same_above(0).await;
        match self {
            Self::Changes => epoch,
            Self::Epoch => server.begin_anew(epoch).await,
        }
    }
}

async fn a_copy_of_the_folder_is_put_back(meanwhile: Meanwhile) {
    let mut server = Restorable::start(&[]).await;
    server.postgres.stop(Shutdown::Fast).await;
    server.postgres.copy();
    server.postgres.start_again().await;
    let epoch = meanwhile.happen(&server).await;
    server.postgres.stop(Shutdown::Fast).await;
    server.postgres.put_back();
    server.postgres.start_again().await;
    server.change(3).await;
    server.same_above(epoch).await;
    server.end().await;
}

async fn a_base_backup_is_promoted(meanwhile: Meanwhile) {
    let mut server = Restorable::start(&[]).await;
    server.postgres.back_up();
    let epoch = meanwhile.happen(&server).await;
    server.postgres.stop(Shutdown::Fast).await;
    server.postgres.promote_backup().await;
    server.change(3).await;
    server.same_above(epoch).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_put_back_to_a_copy_of_its_folder_is_copied_anew() {
    a_copy_of_the_folder_is_put_back(Meanwhile::Changes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_put_back_to_a_copy_of_an_earlier_epoch_is_copied_anew() {
    a_copy_of_the_folder_is_put_back(Meanwhile::Epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_promoted_from_a_base_backup_is_copied_anew() {
    a_base_backup_is_promoted(Meanwhile::Changes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_is_promoted_from_a_base_backup_of_an_earlier_epoch_is_copied_anew() {
    a_base_backup_is_promoted(Meanwhile::Epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_of_postgres_that_was_dropped_by_hand_or_has_lost_its_log_is_made_anew() {
    let mut server = Restorable::start(&["max_slot_wal_keep_size=32MB"]).await;
    let epoch = server.begin_anew(1).await;

    // While nobody reads it, the server throws away what it would have told.
    server.replicator.take().expect("it runs").kill().await.expect("killed");
    server.slot.wait_for("NOT active").await;
    server.change(2).await;
    let losing = async {
        while server.slot.text("wal_status = 'lost'").await != "true" {
            server
                .slot
                .run("SELECT pg_logical_emit_message(false, 'the test', 'a segment is not empty')")
                .await;
            server.slot.run("SELECT pg_switch_wal()").await;
            server.slot.run("CHECKPOINT").await;
        }
    };
    timeout(PATIENCE, losing).await.expect("its log is thrown away");
    server.change(3).await;
    server.replicator = Some(server.here.replicate());
    server.same_above(epoch).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_shut_down_though_what_it_has_told_cannot_be_stored() {
    let engine = Engine::start();
    let mut server = Restorable::start_with(&engine.url(), &[]).await;
    engine.signal("STOP");
    server.change(2).await;
    // It waits until its readers have confirmed everything, or are gone.
    server.postgres.stop(Shutdown::Fast).await;
    engine.signal("CONT");
    server.postgres.start_again().await;
    server.change(3).await;
    server.same_above(0).await;
    server.end().await;
}
