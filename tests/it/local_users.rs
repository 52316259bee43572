//! What other users of the machine must not get at, and what an operator must not get by accident: files, keys, stores.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;

use crate::harness::Process;
use crate::harness::server::KEY;

/// Longest wait for a command that must fail.
const PATIENCE: Duration = Duration::from_secs(60);

fn command(data: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(Process::binary());
    command.arg("--data").arg(data).args(args).env_remove("SESSIOND_SECRET_KEY").kill_on_drop(true);
    command
}

fn serve(data: &Path) -> Command {
    command(data, &["serve", "--listen", "127.0.0.1:0"])
}

async fn json_of(data: &Path, args: &[&str]) -> Value {
    let output = command(data, &[args, &["--json"]].concat()).output().await.expect("runs");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{args:?}: {output:?}"))
}

/// Everything that a command prints on both streams, which must fail.
async fn refused(mut command: Command) -> String {
    let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("ends instead of serving");
    let output = output.expect("the binary runs");
    assert!(!output.status.success(), "{output:?}");
    [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).expect("UTF-8")).concat()
}

/// Everything that a server prints on both streams until it is ready; then it is killed.
async fn printed(mut serve: Command) -> String {
    let mut child = serve.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut text = String::new();
    while let Some(line) = lines.next_line().await.expect("output") {
        text.push_str(&line);
        text.push('\n');
        if line.contains("curl -sN") {
            break;
        }
    }
    child.start_kill().expect("killed");
    let mut errors = child.stderr.take().expect("a pipe");
    errors.read_to_string(&mut text).await.expect("UTF-8");
    assert!(text.contains("is ready"), "{text}");
    text
}

/// A folder and everything in it that group or others may look into.
fn open_to_others(folder: &Path) -> Vec<PathBuf> {
    let mut open = Vec::new();
    each(folder, &mut |path, metadata| {
        if metadata.permissions().mode() & 0o077 != 0 {
            open.push(path.to_owned());
        }
    });
    open
}

fn each(path: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata)) {
    let metadata = fs::metadata(path).expect("is there");
    visit(path, &metadata);
    if metadata.is_dir() {
        for entry in fs::read_dir(path).expect("lists") {
            each(&entry.expect("an entry").path(), visit);
        }
    }
}

/// A server with the umask that most systems have, whatever the one of the tests is.
async fn start_with_umask_022(data: &Path) -> Process {
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"umask 022; exec "$0" "$@""#, Process::binary()]);
    Process::start(&mut shell, data).await
}

/// Makes the server write to everything it has: rows, records, a snapshot.
async fn write_everywhere(process: &Process) {
    let http = reqwest::Client::new();
    let url = |path: &str| format!("{}{path}", process.url);
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"});
    let created = http.post(url("/api/v1/sessions")).bearer_auth(KEY).json(&body).send().await;
    assert!(created.expect("an answer").status().is_success());
    let append = url("/realtime/v1/sessions/s/in/append");
    let appended = http.post(append).bearer_auth(KEY).body("x").send().await.expect("an answer");
    assert_eq!(appended.status(), 200);
    let signed = http.put(url("/api/v1/sessions/s/snapshot-url")).bearer_auth(KEY).send().await;
    let signed: Value = signed.expect("an answer").json().await.expect("JSON");
    let upload = signed["presignedUrl"].as_str().expect("a URL");
    let stored = http.put(upload).body("{}").send().await.expect("an answer");
    assert!(stored.status().is_success(), "{stored:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_server_makes_is_closed_to_other_users_and_what_is_open_is_closed_at_its_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("made/data");
    let process = start_with_umask_022(&data).await;
    write_everywhere(&process).await;
    assert_eq!(open_to_others(&data), Vec::<PathBuf>::new());
    assert!(data.join("blobs").is_dir() && data.join("log/log").is_dir(), "it has made all of it");
    assert!(process.terminate().await.success());

    // As a version that followed the umask has left it.
    each(&data, &mut |path, metadata| {
        let mode = if metadata.is_dir() { 0o755 } else { 0o644 };
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("changed");
    });
    assert!(open_to_others(&data).len() > 10);
    let process = start_with_umask_022(&data).await;
    assert_eq!(open_to_others(&data), Vec::<PathBuf>::new());
    process.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_closed_is_named_and_the_server_starts() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    Process::serve(&data).await.kill().await;
    fs::set_permissions(data.join("master.key"), Permissions::from_mode(0o644)).expect("changed");
    let stderr = folder.path().join("stderr");
    let mut strace = Command::new("strace");
    strace
        // Not every machine has both calls.
        .args(["-f", "--seccomp-bpf", "-e", "trace=?chmod,?fchmodat"])
        .args(["-e", "inject=?chmod,?fchmodat:error=EPERM", "-o", "/dev/null", Process::binary()])
        .stderr(File::create(&stderr).expect("a file"));
    let process = Process::start(&mut strace, &data).await;
    let said = fs::read_to_string(&stderr).expect("UTF-8");
    let warning = said.lines().find(|line| line.contains("WARN") && line.contains("it cannot change that"));
    assert!(warning.is_some_and(|line| line.contains("master.key")), "{said}");
    process.terminate_traced().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_folder_is_synced_after_the_master_key_is_linked_into_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let (data, trace) = (folder.path().join("data"), folder.path().join("trace"));
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-e", "trace=?link,linkat,fsync", "-o"]).arg(&trace).arg(Process::binary());
    strace.args(["environments", "create", "blue", "--data"]).arg(&data);
    let output = strace.output().await.expect("strace");
    assert!(output.status.success(), "{output:?}");
    let trace = fs::read_to_string(trace).expect("a trace");
    let lines: Vec<_> = trace.lines().collect();
    let linked = lines.iter().position(|line| line.contains("link") && line.contains("master.key\""));
    let linked = linked.expect("the link");
    let sync = format!("<{}>", data.canonicalize().expect("a path").display());
    let synced = lines[linked..].iter().any(|line| line.contains("fsync(") && line.contains(&sync));
    assert!(synced, "{trace}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_given_key_is_never_printed_and_one_that_has_changed_is_named_for_as_long_as_it_lives() {
    const NEXT: &str = "tr_dev_the_key_that_came_after_it";
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let start = async |key: &str| {
        let mut serve = serve(data);
        serve.env("SESSIOND_SECRET_KEY", key).env("SESSIOND_TELEMETRY__LOG", "debug");
        let text = printed(serve).await;
        assert!(!text.contains(KEY) && !text.contains(NEXT), "{text}");
        text
    };
    let warns = |text: &str| text.lines().find(|line| line.contains("still opens")).map(str::to_owned);
    let first = start(KEY).await;
    let old = json_of(data, &["keys", "list"]).await[0]["id"].as_str().expect("an id").to_owned();
    assert!(first.contains(&old) && warns(&first).is_none(), "{first}");
    assert_eq!(warns(&start(KEY).await), None);

    let changed = start(NEXT).await;
    let keys = json_of(data, &["keys", "list"]).await;
    let new = keys[0]["id"].as_str().expect("an id").to_owned();
    let warning = warns(&changed).unwrap_or_else(|| panic!("{changed}"));
    assert!(new != old && warning.contains(&old) && warning.contains(&new), "{warning}");
    assert!(warns(&start(NEXT).await).is_some_and(|line| line.contains(&old)), "for as long as it lives");

    for (id, key) in [(&old, None), (&new, None), (&new, Some(NEXT))] {
        let mut show = command(data, &["keys", "show", id]);
        show.envs(key.map(|key| ("SESSIOND_SECRET_KEY", key)));
        let refusal = refused(show).await;
        assert!(refusal.contains(id.as_str()) && refusal.contains("is not shown"), "{refusal}");
        assert!(!refusal.contains(KEY) && !refusal.contains(NEXT), "{refusal}");
    }
    let without = printed(serve(data)).await;
    assert!(without.contains(&new) && !without.contains(NEXT), "nor once it is not set any more: {without}");
    json_of(data, &["keys", "revoke", &old]).await;
    assert_eq!(warns(&start(NEXT).await), None);
    let rotated = json_of(data, &["keys", "rotate", &new]).await;
    let made = rotated["id"].as_str().expect("an id");
    assert_eq!(json_of(data, &["keys", "show", made]).await["secretKey"], rotated["secretKey"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_generated_key_that_lives_on_is_named_when_one_is_given() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    printed(serve(data)).await;
    let generated = json_of(data, &["keys", "list"]).await[0]["id"].as_str().expect("an id").to_owned();
    let secret = json_of(data, &["keys", "show", &generated]).await["secretKey"]
        .as_str()
        .expect("a secret")
        .to_owned();
    let mut given = serve(data);
    given.env("SESSIOND_SECRET_KEY", KEY);
    let text = printed(given).await;
    let warning = text.lines().find(|line| line.contains("still opens"));
    assert!(warning.is_some_and(|line| line.contains(&generated)), "{text}");

    // Once it is given itself it is kept elsewhere, and so never shown again.
    let mut given = serve(data);
    given.env("SESSIOND_SECRET_KEY", secret);
    printed(given).await;
    let refusal = refused(command(data, &["keys", "show", &generated])).await;
    assert!(refusal.contains("is not shown"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_key_that_is_gone_or_wrong_stops_every_command_while_keys_are_stored() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path();
    let first = printed(serve(data)).await;
    assert!(first.contains("tr_dev_"), "{first}");
    let file = data.join("master.key");
    let right = fs::read_to_string(&file).expect("a key");
    let another = "ab".repeat(32);
    fs::remove_file(&file).expect("removed");
    for args in
        [&["serve", "--listen", "127.0.0.1:0"][..], &["keys", "create"], &["environments", "create", "x"]]
    {
        let refusal = refused(command(data, args)).await;
        assert!(refusal.contains("master.key is gone"), "{args:?}: {refusal}");
        assert!(!file.exists(), "no other one is made");
    }
    for (content, fault) in
        [(another.as_str(), "is not the one"), ("", "64 hex digits"), ("x", "64 hex digits")]
    {
        fs::write(&file, content).expect("written");
        let refusal = refused(serve(data)).await;
        assert!(refusal.contains(fault) && refusal.contains("master.key"), "{refusal}");
    }
    fs::write(&file, &right).expect("written");
    let mut set = serve(data);
    set.env("SESSIOND_AUTH__MASTER_KEY", &another);
    let refusal = refused(set).await;
    assert!(refusal.contains("auth.master_key is not the one"), "{refusal}");
    assert!(!refusal.contains(&another) && !refusal.contains(&right), "{refusal}");
    printed(serve(data)).await;

    // What no live key is sealed with is nobody's loss.
    let id = json_of(data, &["keys", "list"]).await[0]["id"].as_str().expect("an id").to_owned();
    json_of(data, &["keys", "revoke", &id]).await;
    fs::remove_file(&file).expect("removed");
    let fresh = printed(serve(data)).await;
    assert!(fresh.contains("tr_dev_") && file.exists(), "{fresh}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_start_a_migration_and_an_environment_make_a_store() {
    let folder = tempfile::tempdir().expect("a folder");
    let typo = folder.path().join("typo");
    for args in [
        &["tail", "s"][..],
        &["send", "s", "hi"],
        &["send", "s", "hi", "--create"],
        &["keys", "list"],
        &["keys", "show", "key_x"],
        &["keys", "create"],
        &["keys", "rotate", "key_x"],
        &["keys", "revoke", "key_x"],
        &["environments", "list"],
        &["token", "--scope", "read:sessions"],
    ] {
        let refusal = refused(command(&typo, args)).await;
        let named = refusal.contains("there is no metadata store in") && refusal.contains("typo");
        assert!(named && refusal.contains("--data"), "{args:?}: {refusal}");
        assert!(!typo.exists(), "{args:?} made a folder");
    }
    for (name, args) in [("migrated", &["migrate"][..]), ("created", &["environments", "create", "blue"])] {
        let data = folder.path().join(name);
        let output = command(&data, args).output().await.expect("runs");
        assert!(output.status.success(), "{output:?}");
        assert!(data.join("metadata.db").exists());
        assert_eq!(open_to_others(&data), Vec::<PathBuf>::new(), "{name}");
    }
    // A store without keys has none to give, and gets none by being asked.
    let migrated = folder.path().join("migrated");
    for args in [&["tail", "s"][..], &["keys", "list"], &["token", "--scope", "read:sessions"]] {
        refused(command(&migrated, args)).await;
    }
    assert!(!migrated.join("master.key").exists());
}
