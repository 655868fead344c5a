//! `--judge`: the reports of the model before a language model on another server.

use std::{
    env,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::EvalArgs;
use crate::{
    commands::usage::UsageError,
    eval::{
        caveat::Caveat,
        judge::{
            Endpoint, JudgeOutcome,
            ask::ask,
            check::{CheckOutcome, planted},
        },
        outcome::EvalOutcome,
    },
    study::counted,
};

/// Planted errors of each kind, and pairs without one.
const PLANTED_EACH: usize = 20;

/// Asks the judge that `args` name about the first system of `outcome`.
///
/// # Errors
/// An address or key that is none, a server that does not answer; what was answered stays in the cache.
pub(super) fn judge(
    args: &EvalArgs,
    outcome: &EvalOutcome,
    warnings: &mut Vec<Caveat>,
) -> Result<Option<JudgeOutcome>> {
    let Some(url) = &args.judge else {
        return Ok(None);
    };
    let key = args.judge_key_env.as_deref().map(key).transpose()?;
    let timeout = Duration::from_secs(args.judge_timeout_seconds);
    let endpoint = Endpoint::open(url, args.judge_model.as_deref(), key, timeout)?;
    let cache = cache_file(args);
    let pairs: Vec<(&str, &str)> = outcome
        .cases
        .iter()
        .zip(&outcome.texts)
        .map(|(case, text)| (case.truth.as_str(), text.answer.as_str()))
        .collect();
    eprintln!(
        "judge: sending {} with their references to {} ({}); {}",
        counted(pairs.len(), "report", "reports"),
        endpoint.url(),
        endpoint.model(),
        match &cache {
            Some(path) => format!("answers are kept in `{}`", path.display()),
            None => "answers are not kept: name --json, --html, --output or --judge-cache to resume a run that ends early".to_owned(),
        }
    );
    let verdicts = asked(args, &endpoint, &pairs, cache.as_deref())?;
    let studies: Vec<&str> = outcome
        .cases
        .iter()
        .map(|case| case.study.as_str())
        .collect();
    let mut found = JudgeOutcome::of(
        endpoint.url(),
        endpoint.model(),
        endpoint.holds_schema(),
        &studies,
        verdicts,
        &outcome.settings.bootstrap,
    )?;
    if args.judge_check {
        let pairs = planted(PLANTED_EACH);
        let texts: Vec<(&str, &str)> = pairs
            .iter()
            .map(|pair| (pair.reference.as_str(), pair.answer.as_str()))
            .collect();
        eprintln!(
            "judge: {} with planted errors",
            counted(texts.len(), "pair", "pairs")
        );
        let verdicts = asked(args, &endpoint, &texts, cache.as_deref())?;
        found.check = Some(CheckOutcome::of(&pairs, &verdicts));
    }
    found.schema = endpoint.holds_schema();
    warnings.extend(remarks(&found));
    Ok(Some(found))
}

fn asked(
    args: &EvalArgs,
    endpoint: &Endpoint,
    pairs: &[(&str, &str)],
    cache: Option<&Path>,
) -> Result<crate::eval::judge::ask::Verdicts> {
    let done = AtomicUsize::new(0);
    let tick = || {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        if done.is_multiple_of(50) {
            eprintln!("judge: {done} of {}", pairs.len());
        }
    };
    ask(endpoint, pairs, args.judge_concurrency, cache, &tick).with_context(|| match cache {
        Some(path) => format!(
            "the judge did not come to an end; its answers so far are in `{}`, and the same command goes on with them",
            path.display()
        ),
        None => "the judge did not come to an end".to_owned(),
    })
}

fn key(variable: &str) -> Result<String> {
    match env::var(variable) {
        Ok(key) if !key.trim().is_empty() => Ok(key.trim().to_owned()),
        _ => bail!(UsageError(format!(
            "--judge-key-env: the environment variable `{variable}` is not set, expected the judge's key"
        ))),
    }
}

/// Where answers are kept.
fn cache_file(args: &EvalArgs) -> Option<PathBuf> {
    let beside = [&args.json, &args.html, &args.output];
    args.judge_cache.clone().or_else(|| {
        let file = beside.into_iter().flatten().next()?;
        Some(file.with_extension("judge.jsonl"))
    })
}

fn remarks(found: &JudgeOutcome) -> Vec<Caveat> {
    let mut remarks = vec![Caveat::new(
        format!(
            "参考报告与模型报告的全文已发送到 {}（模型 {}）",
            found.url, found.model
        ),
        format!(
            "the whole text of references and answers was sent to {} (model {})",
            found.url, found.model
        ),
    )];
    let first = found.first_fault.as_deref().unwrap_or_default();
    if found.unreadable > 0 {
        remarks.push(Caveat::new(
            format!(
                "评审模型有 {} 份回答不可读，未计分；第一个原因：{first}",
                found.unreadable
            ),
            format!(
                "{} of the judge cannot be read and are not scored; the first reason: {first}",
                counted(found.unreadable, "answer", "answers")
            ),
        ));
    }
    if found.failed > 0 {
        remarks.push(Caveat::new(
            format!("评审模型对 {} 份报告没有回答，未计分", found.failed),
            format!(
                "the judge gave no answer about {}, which are not scored",
                counted(found.failed, "report", "reports")
            ),
        ));
    }
    if !found.schema {
        remarks.push(Caveat::new(
            "评审服务器不支持按格式约束回答",
            "the judge's server does not hold answers to a schema; they were asked for in words alone",
        ));
    }
    remarks
}
