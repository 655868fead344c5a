//! Rewards that another program gives: over its standard input and output, or over HTTP.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use ureq::Agent;

use super::{Answered, Reward, RewardConfig};

/// Seconds that the answers of a rollout may take.
const PATIENCE: f64 = 600.0;

/// Requests to a server before the run ends.
const ATTEMPTS: u32 = 4;

/// Wait after the first failure; it doubles.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Longest answer of a server that is read.
const LONGEST_ANSWER: u64 = 64 << 20;

fn patience(config: &RewardConfig) -> Duration {
    Duration::from_secs_f64(config.timeout.unwrap_or(PATIENCE))
}

/// The reward in one line or one entry: a number, or an object with `reward`.
fn reward_of(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.get("reward")?.as_f64())
}

/// A program that stays: a JSON line in for each answer, a JSON line out for each, in their order.
pub(super) struct Program {
    command: Vec<String>,
    patience: Duration,
    running: Option<Running>,
}

struct Running {
    child: Child,
    lines: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its input ends here; what it still does is not waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    pub(super) fn new(config: &RewardConfig) -> Self {
        Self {
            command: config.command.clone().unwrap_or_default(),
            patience: patience(config),
            running: None,
        }
    }

    fn start(&self) -> Result<Running, String> {
        let (program, arguments) = self.command.split_first().ok_or("it has no command")?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|cause| format!("cannot start `{program}`: {cause}"))?;
        let output = child.stdout.take().ok_or("it has no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Running { child, lines })
    }
}

/// How the program ended, if it does within seconds.
fn ended(child: &mut Child) -> Option<ExitStatus> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            other => return other.ok().flatten(),
        }
    }
}

impl Reward for Program {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.start()?,
        };
        let mut text = Vec::new();
        for answer in answers {
            serde_json::to_writer(&mut text, answer).map_err(|cause| cause.to_string())?;
            text.push(b'\n');
        }
        let mut input = running.child.stdin.take().ok_or("its input is closed")?;
        // In a thread of its own: a program that answers as it reads must not wait for us.
        let writing = thread::spawn(move || {
            let written = input.write_all(&text).and_then(|()| input.flush());
            written.map(|()| input)
        });
        let until = Instant::now() + self.patience;
        let mut values = Vec::with_capacity(answers.len());
        while values.len() < answers.len() {
            let left = until.saturating_duration_since(Instant::now());
            let line = running.lines.recv_timeout(left).map_err(|cause| {
                let (had, all) = (values.len(), answers.len());
                match cause {
                    // A program that ends closes its output a little earlier.
                    RecvTimeoutError::Disconnected => match ended(&mut running.child) {
                        Some(status) => {
                            format!("the program ended ({status}) after {had} of {all} answers")
                        }
                        None => {
                            format!("the program closed its output after {had} of {all} answers")
                        }
                    },
                    RecvTimeoutError::Timeout => format!(
                        "no line for answer {} of {all} in {} seconds; does the program flush its output?",
                        had + 1,
                        self.patience.as_secs_f64()
                    ),
                }
            })?;
            let value: Option<Value> = serde_json::from_str(&line).ok();
            values.push(value.as_ref().and_then(reward_of).ok_or_else(|| {
                let line: String = line.chars().take(200).collect();
                format!("`{line}` is no number and no object with `reward`")
            })?);
        }
        let input = writing.join().map_err(|_| "its input failed".to_owned())?;
        running.child.stdin = Some(input.map_err(|cause| format!("its input: {cause}"))?);
        self.running = Some(running);
        Ok(values)
    }
}

/// A server that all answers of a rollout are posted to.
pub(super) struct Server {
    url: String,
    agent: Agent,
}

impl Server {
    pub(super) fn new(config: &RewardConfig) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(patience(config)))
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("xray-qwen3vl/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self {
            url: config.url.clone().unwrap_or_default(),
            agent,
        }
    }

    /// Posts once; `Err` with whether another try may help.
    fn post(&self, body: &str) -> Result<Value, (bool, String)> {
        let request = self
            .agent
            .post(&self.url)
            .header("Content-Type", "application/json");
        let response = request
            .send(body)
            .map_err(|cause| (true, cause.to_string()))?;
        let status = response.status().as_u16();
        let mut text = String::new();
        let mut body = response.into_body();
        let reading = body
            .with_config()
            .limit(LONGEST_ANSWER)
            .reader()
            .read_to_string(&mut text);
        reading.map_err(|cause| (true, cause.to_string()))?;
        if status != 200 {
            let again = matches!(status, 408 | 425 | 429 | 500..=599);
            let short: String = text.chars().take(200).collect();
            return Err((again, format!("status {status}: {short}")));
        }
        serde_json::from_str(&text)
            .map_err(|cause| (false, format!("its answer is no JSON: {cause}")))
    }
}

impl Reward for Server {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let body = json!({"answers": answers}).to_string();
        let mut failure = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                thread::sleep(FIRST_WAIT * 2_u32.pow(attempt - 1));
            }
            match self.post(&body) {
                Ok(answer) => {
                    let list = answer.get("rewards").and_then(Value::as_array);
                    let list = list.ok_or("its answer has no list `rewards`")?;
                    let values = list.iter().map(|value| {
                        reward_of(value).ok_or_else(|| format!("`{value}` is no reward"))
                    });
                    return values.collect();
                }
                Err((true, reason)) => failure = reason,
                Err((false, reason)) => return Err(format!("`{}`: {reason}", self.url)),
            }
        }
        Err(format!("`{}`: {failure}", self.url))
    }
}
