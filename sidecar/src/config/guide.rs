//! The guide's table of Dynamo's settings.

use std::fmt::Write as _;

use super::setting::{Effect, Kind, Setting, all};

/// A Markdown table: each of Dynamo's settings with what it comes to here. The guide has it as it
/// is.
#[must_use]
pub fn dynamo_settings() -> String {
    let mut table = String::from("| flag | variable | here |\n|---|---|---|\n");
    let is_dynamos = |setting: &&Setting| {
        let mut names = setting.variables.iter();
        setting.effect != Effect::Key || names.any(|name| name.starts_with("DYN_"))
    };
    let (does, does_not): (Vec<_>, Vec<_>) = all()
        .filter(is_dynamos)
        .partition(|setting| matches!(setting.effect, Effect::Key | Effect::Preset(_)));
    for setting in does.into_iter().chain(does_not) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} | {} | {} |",
            flags(setting),
            names("", setting.variables),
            meaning(setting)
        );
    }
    table
}

fn names(before: &str, names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|n| format!("`{before}{n}`")).collect();
    names.join(", ")
}

fn flags(setting: &Setting) -> String {
    let positive = names("--", setting.flags);
    match setting.kind {
        Kind::Switch(negative) if !negative.is_empty() => {
            format!("{positive}; {}", names("--", negative))
        }
        _ => positive,
    }
}

fn meaning(setting: &Setting) -> String {
    match setting.effect {
        Effect::Key => format!("`{}`", setting.key),
        Effect::Preset(keys) => {
            let keys = keys.iter().map(|(key, value)| format!("`{key}: {value}`"));
            format!(
                "{}, unless set otherwise",
                keys.collect::<Vec<_>>().join(", ")
            )
        }
        Effect::Refused { unless: [], why } => format!("refused: {why}"),
        Effect::Refused { unless, why } => {
            format!("refused, but for {}: {why}", names("", unless))
        }
        Effect::Elsewhere(why) => format!("let be: {why}"),
    }
}
