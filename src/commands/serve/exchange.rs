//! The flags of `serve` by which studies come in and reports go out, and the threads that do it.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Args;

use crate::{
    commands::usage::UsageError,
    exchange::{
        intake::Intake,
        outbox::{Outbox, OutboxCounts, Target, TargetKind},
        poll::Polled,
        receive::{ReceiveOptions, Receiver},
        report::PdfFont,
        watch::Watched,
    },
    processor::image::DecodeLimits,
    serve::studies::Studies,
};

/// The environment's name for the header by which DICOMweb services let us in.
const AUTHORIZATION: &str = "XRAY_DICOMWEB_AUTHORIZATION";

/// Time between two looks for what is due.
const PAUSE: Duration = Duration::from_millis(500);

/// Studies in and reports out.
#[derive(Debug, Args)]
#[command(next_help_heading = "Studies in, reports out")]
pub struct ExchangeArgs {
    /// Take films by DICOM's C-STORE (and C-ECHO) under this title at this port of --host; 0 selects a free port.
    /// They come unencrypted, with --tls-cert as well: in a network that is not trusted, put a TLS tunnel before it.
    #[arg(long, value_name = "AET:PORT")]
    pub dicom: Option<String>,
    /// Title that may send films; can be given several times. Without it any may.
    #[arg(long, value_name = "AET", requires = "dicom")]
    pub dicom_allow: Vec<String>,
    /// Maximum number of DICOM associations at the same time.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub dicom_max_associations: usize,
    /// Time without a message after which a DICOM association ends.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub dicom_timeout_seconds: u64,
    /// Take films that are put into this folder; they are moved to `taken` or `refused` below it.
    #[arg(long, value_name = "FOLDER")]
    pub watch: Option<PathBuf>,
    /// Read films of CR and DX from a DICOMweb service (QIDO-RS, WADO-RS). XRAY_DICOMWEB_AUTHORIZATION may have the value
    /// of the header `Authorization`.
    #[arg(long, value_name = "URL")]
    pub dicomweb: Option<String>,
    /// Days before today whose studies are read from --dicomweb.
    #[arg(long, value_name = "DAYS", default_value_t = 1)]
    pub dicomweb_days: u32,
    /// Time between two questions to --dicomweb.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub dicomweb_seconds: u64,
    /// Largest film that is taken.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub max_film_mib: u64,
    /// Time without a further film after which a study is complete, and its draft is written.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub study_quiet: u64,
    /// Send reports, as DICOM SR and PDF, to a title by C-STORE, or to a DICOMweb service by STOW-RS; can be given
    /// several times.
    #[arg(long, value_name = "AET@HOST:PORT|URL")]
    pub send_to: Vec<String>,
    /// Write reports as messages of HL7 v2 (ORU^R01) into this folder.
    #[arg(long, value_name = "FOLDER")]
    pub hl7_folder: Option<PathBuf>,
    /// Write reports as FHIR R4 resources (DiagnosticReport) into this folder.
    #[arg(long, value_name = "FOLDER")]
    pub fhir_folder: Option<PathBuf>,
    /// Send drafts as well, marked as such and unverified; without it only signed reports go out.
    #[arg(long)]
    pub send_drafts: bool,
    /// Font of PDFs, with Chinese letters (.ttf, .otf, .ttc); without it one that the system has.
    #[arg(long, value_name = "FILE")]
    pub pdf_font: Option<PathBuf>,
}

fn wrong(text: String) -> anyhow::Error {
    UsageError(text).into()
}

/// A title of DICOM's network: 1 to 16 visible letters, no backslash.
fn title(text: &str, flag: &str) -> Result<String> {
    let good = |c: u8| (b' '..=b'~').contains(&c) && c != b'\\';
    if text.is_empty() || text.len() > 16 || text.trim() != text || !text.bytes().all(good) {
        return Err(wrong(format!(
            "{flag}: `{text}` is no title of an application, expected 1 to 16 letters of ASCII"
        )));
    }
    Ok(text.to_owned())
}

/// An address of a DICOMweb service.
fn service(url: &str, flag: &str) -> Result<String> {
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    let Some(host) = rest
        .and_then(|rest| rest.split('/').next())
        .filter(|host| !host.is_empty())
    else {
        return Err(wrong(format!(
            "{flag} `{url}` is no address, expected http://… or https://…"
        )));
    };
    if host.contains('@') {
        return Err(wrong(format!(
            "{flag} has a user or password in its address, which would get into lists of processes; give the header's value in {AUTHORIZATION}"
        )));
    }
    #[cfg(not(feature = "tls"))]
    if url.starts_with("https://") {
        anyhow::bail!("this program was built without `tls`; build it with `--features tls`");
    }
    Ok(url.trim_end_matches('/').to_owned())
}

impl ExchangeArgs {
    /// Whether studies come in by any of the flags.
    pub(super) fn has_source(&self) -> bool {
        self.dicom.is_some() || self.watch.is_some() || self.dicomweb.is_some()
    }

    /// Title and port of --dicom.
    fn listening(&self) -> Result<Option<(String, u16)>> {
        let Some(text) = &self.dicom else {
            return Ok(None);
        };
        let form = || wrong(format!("--dicom `{text}` is not of the form AET:PORT"));
        let (name, port) = text.rsplit_once(':').ok_or_else(form)?;
        Ok(Some((
            title(name, "--dicom")?,
            port.parse().map_err(|_| form())?,
        )))
    }

    fn targets(&self) -> Result<Vec<Target>> {
        let mut targets = Vec::new();
        for text in &self.send_to {
            let kind = if text.contains("://") {
                TargetKind::Web {
                    base: service(text, "--send-to")?,
                    authorization: std::env::var(AUTHORIZATION).ok(),
                }
            } else {
                let form = || {
                    wrong(format!(
                        "--send-to `{text}` is neither AET@HOST:PORT nor an address http(s)://…"
                    ))
                };
                let (name, address) = text.split_once('@').ok_or_else(form)?;
                let (host, port) = address.rsplit_once(':').ok_or_else(form)?;
                if host.is_empty() || port.parse::<u16>().is_err() {
                    return Err(form());
                }
                TargetKind::Dicom {
                    title: title(name, "--send-to")?,
                    address: address.to_owned(),
                }
            };
            targets.push(Target {
                name: text.clone(),
                kind,
            });
        }
        let folders = [
            ("hl7-folder", self.hl7_folder.clone().map(TargetKind::Hl7)),
            (
                "fhir-folder",
                self.fhir_folder.clone().map(TargetKind::Fhir),
            ),
        ];
        for (name, kind) in folders {
            if let Some(kind) = kind {
                targets.push(Target {
                    name: name.into(),
                    kind,
                });
            }
        }
        Ok(targets)
    }

    /// Checks the flags before a model is loaded.
    pub(super) fn check(&self, has_store: bool) -> Result<()> {
        self.listening()?;
        for name in &self.dicom_allow {
            title(name, "--dicom-allow")?;
        }
        if let Some(url) = &self.dicomweb {
            service(url, "--dicomweb")?;
        }
        for (flag, value) in [
            (
                "--dicom-max-associations",
                self.dicom_max_associations as u64,
            ),
            ("--dicom-timeout-seconds", self.dicom_timeout_seconds),
            ("--dicomweb-seconds", self.dicomweb_seconds),
            ("--max-film-mib", self.max_film_mib),
        ] {
            if value == 0 {
                return Err(wrong(format!("{flag} is 0, expected at least 1")));
            }
        }
        if self.max_film_mib > 2048 {
            return Err(wrong(format!(
                "--max-film-mib is {}, expected at most 2048",
                self.max_film_mib
            )));
        }
        let sends = !self.targets()?.is_empty() || self.send_drafts || self.pdf_font.is_some();
        if sends && !has_store && !self.has_source() {
            return Err(wrong(
                "there are no studies whose reports could go out; give --store, --dicom, --watch or --dicomweb".into(),
            ));
        }
        if self.send_drafts && self.targets()?.is_empty() {
            return Err(wrong("--send-drafts has nowhere to send to; give --send-to, --hl7-folder or --fhir-folder".into()));
        }
        Ok(())
    }

    /// The outbox of a server that keeps studies.
    ///
    /// # Errors
    /// A target that takes PDFs, or --pdf-font, and no font.
    pub(super) fn outbox(&self) -> Result<Outbox> {
        let targets = self.targets()?;
        let sends_pdf = targets.iter().any(|target| {
            matches!(
                target.kind,
                TargetKind::Dicom { .. } | TargetKind::Web { .. }
            )
        });
        let font = match PdfFont::find(self.pdf_font.as_deref()) {
            Ok(font) => Some(font),
            Err(error) if self.pdf_font.is_some() => return Err(error.into()),
            Err(error) => {
                if sends_pdf {
                    log::warn!("reports go out as SR alone, without PDF: {error}");
                }
                None
            }
        };
        let title = self
            .listening()?
            .map_or_else(|| "XRAY".to_owned(), |(title, _)| title);
        Ok(Outbox {
            targets,
            drafts: self.send_drafts,
            title,
            font,
            counts: OutboxCounts::default(),
        })
    }
}

/// The threads of a running exchange.
pub(super) struct Exchange {
    stop: Arc<AtomicBool>,
    receiver: Option<Receiver>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// Runs `work` again and again, `pause` apart, until it is to stop; says once that it fails, and once that it does again.
fn repeat(
    name: &'static str,
    stop: &Arc<AtomicBool>,
    pause: Duration,
    mut work: impl FnMut() -> Result<(), String> + Send + 'static,
) -> Result<thread::JoinHandle<()>> {
    let stop = stop.clone();
    let spawned = thread::Builder::new().name(name.into()).spawn(move || {
        let mut failing = false;
        let mut last: Option<Instant> = None;
        while !stop.load(Ordering::Relaxed) {
            if last.is_some_and(|last| last.elapsed() < pause) {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
            last = Some(Instant::now());
            match (work(), failing) {
                (Err(reason), false) => {
                    log::warn!(
                        "{name}: {reason}; it is tried again every {} s",
                        pause.as_secs_f32()
                    );
                    failing = true;
                }
                (Ok(()), true) => {
                    log::info!("{name}: works again");
                    failing = false;
                }
                _ => {}
            }
        }
    });
    spawned.context("no thread")
}

impl Exchange {
    /// Starts what the flags ask for.
    ///
    /// # Errors
    /// A port or folder that cannot be used.
    pub(super) fn start(
        flags: &ExchangeArgs,
        host: IpAddr,
        has_certificate: bool,
        studies: &Studies,
        limits: &DecodeLimits,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let bytes = flags.max_film_mib << 20;
        let limits = DecodeLimits {
            max_file_bytes: bytes,
            ..limits.clone()
        };
        let intake = Arc::new(Intake::new(studies.store.clone(), limits));
        let mut threads = Vec::new();
        let mut receiver = None;
        if let Some((title, port)) = flags.listening()? {
            let address = SocketAddr::new(host, port);
            let listener = TcpListener::bind(address).with_context(|| {
                format!("--dicom cannot listen at {address}; is the port in use?")
            })?;
            let options = ReceiveOptions {
                title: title.clone(),
                allowed: flags.dicom_allow.clone(),
                max_associations: flags.dicom_max_associations,
                timeout: Duration::from_secs(flags.dicom_timeout_seconds),
                max_object_bytes: bytes,
                max_memory_bytes: 2 * bytes,
            };
            let started = Receiver::start(listener, options, intake.clone())?;
            eprintln!("DICOM: `{title}` at {}", started.address());
            if has_certificate {
                eprintln!(
                    "warning: --tls-cert is for HTTP alone; films come over DICOM unencrypted"
                );
            }
            if !host.is_loopback() && flags.dicom_allow.is_empty() {
                eprintln!(
                    "warning: everybody who reaches {} can send films; --dicom-allow names those who may",
                    started.address()
                );
            }
            receiver = Some(started);
        }
        if let Some(folder) = &flags.watch {
            let mut watched = Watched::new(folder, bytes).map_err(anyhow::Error::msg)?;
            let intake = intake.clone();
            threads.push(repeat("watched folder", &stop, PAUSE, move || {
                watched.look(&intake).map(|_| ())
            })?);
        }
        if let Some(url) = &flags.dicomweb {
            let authorization = std::env::var(AUTHORIZATION).ok();
            let mut polled = Polled::new(
                &service(url, "--dicomweb")?,
                authorization,
                flags.dicomweb_days,
                bytes,
            );
            let intake = intake.clone();
            let pause = Duration::from_secs(flags.dicomweb_seconds);
            threads.push(repeat("DICOMweb service", &stop, pause, move || {
                polled.look(&intake).map(|_| ())
            })?);
        }
        if flags.has_source() {
            let quiet = Duration::from_secs(flags.study_quiet);
            threads.push(repeat("studies", &stop, PAUSE, move || {
                intake
                    .complete(quiet)
                    .map(|_| ())
                    .map_err(|error| error.to_string())
            })?);
        }
        if let Some(outbox) = studies
            .outbox
            .clone()
            .filter(|outbox| !outbox.targets.is_empty())
        {
            let store = studies.store.clone();
            threads.push(repeat("outbox", &stop, PAUSE, move || {
                outbox
                    .send_due(store.as_ref())
                    .map(|_| ())
                    .map_err(|error| error.to_string())
            })?);
        }
        Ok(Self {
            stop,
            receiver,
            threads,
        })
    }

    /// Ends the associations and waits for the threads: what is on its way is sent, or tried again after the next start.
    pub(super) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(receiver) = self.receiver {
            receiver.stop();
        }
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}
