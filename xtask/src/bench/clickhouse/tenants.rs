//! The two environments that are measured, made by the commands of the server, and the tables, likewise.

use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde_json::Value;

use super::engine::Engine;
use crate::bench::ours;
use crate::process;

/// An environment and its key.
pub(super) struct Tenant {
    /// How the tables name it.
    pub(super) name: &'static str,
    pub(super) key: String,
    pub(super) organization: String,
    pub(super) project: String,
    pub(super) environment: String,
}

impl Tenant {
    fn new(name: &'static str, key: &str, environment: &Value) -> anyhow::Result<Self> {
        let text = |field: &str| {
            environment[field].as_str().map(str::to_owned).context("an environment without names")
        };
        Ok(Self {
            name,
            key: key.to_owned(),
            organization: text("organization")?,
            project: text("project")?,
            environment: text("id")?,
        })
    }

    /// What its rows are.
    pub(super) fn condition(&self) -> String {
        let Self { organization, project, environment, .. } = self;
        format!(
            "organization_id = '{organization}' AND project_id = '{project}' AND environment_id = '{environment}'"
        )
    }
}

/// Makes both, the large one first, and the tables: a rebuild of nothing makes them and lets lists be served.
pub(super) fn tenants(binary: &Path, home: &Path, engine: &Engine) -> anyhow::Result<[Tenant; 2]> {
    ours::start(binary, home, &[])?.stop_keeping_data();
    let command = |words: &[&str]| -> anyhow::Result<Value> {
        let mut command = Command::new(binary);
        command.args(words).args(["--json", "--data"]).arg(home.join("data"));
        let answer = process::output(command.env("SESSIOND_CLICKHOUSE__URL", engine.url()))?;
        Ok(serde_json::from_slice(&answer)?)
    };
    let small = command(&["environments", "create", "small"])?;
    let all = command(&["environments", "list"])?;
    let large = all.as_array().into_iter().flatten().find(|one| one["id"] != small["id"]);
    command(&["index", "rebuild"])?;
    let key = small["secretKey"].as_str().context("no key")?;
    Ok([
        Tenant::new("half of all", ours::KEY, large.context("the server has made no environment")?)?,
        Tenant::new("1 in 1200", key, &small)?,
    ])
}
