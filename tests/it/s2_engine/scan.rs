//! Part ids come from the log: a long channel is searched once, and then only what is new.

use std::time::Instant;

use super::*;

const RECORDS: usize = 100_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn part_ids_of_a_hundred_thousand_records_are_found_by_one_search() {
    let (endpoint, basin, key) = (endpoint(), fresh_basin(), main_out("long"));
    let writer = open(&endpoint, &basin).await;
    let body = |number: usize| format!(r#"{{"data":"{}","id":"p{number}"}}"#, "x".repeat(80));
    let batches = (0..RECORDS / 1000).map(|batch| {
        let numbers = batch * 1000..(batch + 1) * 1000;
        let records = numbers.map(|number| NewRecord::data(body(number))).collect();
        writer.append(&key, AppendInput::new(records).expect("fits"))
    });
    let acks = futures_util::future::join_all(batches).await;
    assert_eq!(acks.last().expect("batches").as_ref().expect("appends").end.seq_num, RECORDS as u64);
    let fresh = open(&endpoint, &basin).await;
    let search = Instant::now();
    let first = fresh.append(&key, part("p5", &body(5))).await.expect("is known");
    let searched = search.elapsed();
    assert_eq!((first.repeated, first.seq_nums), (true, vec![5]));
    let known = Instant::now();
    let new = fresh.append(&key, part("new", "x")).await.expect("appends");
    let appended = known.elapsed();
    assert_eq!((new.repeated, new.seq_nums), (false, vec![RECORDS as u64]));
    let last = fresh.append(&key, part("p99999", &body(99_999))).await.expect("is known");
    assert_eq!(last.seq_nums, [99_999]);
    // Past the runner's capture, which would swallow what a passing test prints.
    let line = format!(
        "part ids of {RECORDS} records: {searched:.1?} to search, {appended:.1?} for the next append\n"
    );
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("printed");
}
