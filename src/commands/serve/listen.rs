//! The server of `serve` on its address: its settings, its connections, and what stops it.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::net::TcpListener;

use super::{Serve, args::loras, exchange::Exchange};
use crate::{
    base::system::open_files_limit,
    serve::{
        App, ServeConfig,
        cors::AllowedOrigins,
        http::{self, Transport},
        router::router,
        studies::draft_studies,
    },
};

/// Files beside the connections: those of the process itself, of images that are fetched, and spare ones.
const OTHER_FILES: u64 = 64 + http::SPARE_CONNECTIONS as u64;

/// Connections of `wanted` for which `files` open files are enough; a quarter of few.
fn connections_with(files: u64, wanted: usize) -> usize {
    let most = files.saturating_sub(OTHER_FILES).max(files / 4).max(1);
    usize::try_from(most).map_or(wanted, |most| most.min(wanted))
}

fn lowercase(names: &[String]) -> Vec<String> {
    names.iter().map(|name| name.to_ascii_lowercase()).collect()
}

impl Serve {
    pub(super) fn config(&self) -> ServeConfig {
        let args = &self.args;
        ServeConfig {
            max_body_bytes: args.max_body_mib << 20,
            max_image_pixels: args.max_image_megapixels.saturating_mul(1_000_000),
            max_images: args.max_images,
            max_choices: args.max_running.min(args.max_queue).min(8),
            default_new_tokens: self.defaults.max_new_tokens,
            max_new_tokens: args.max_new_tokens_limit,
            sampling: self.defaults.sampling.clone(),
            stop_on_repetition: self.defaults.stop_on_repetition,
            request_timeout: Duration::from_secs(args.request_timeout_seconds),
            read_timeout: Duration::from_secs(args.read_timeout_seconds),
            write_timeout: Duration::from_secs(args.write_timeout_seconds),
            max_connections: self.connections(),
            max_connections_per_address: args.max_connections_per_address,
            trusted_proxies: args
                .trusted_proxy
                .iter()
                .map(IpAddr::to_canonical)
                .collect(),
            waiting_memory_bytes: (args.max_waiting_memory_mib as u64) << 20,
            allow_image_urls: args.allow_image_urls,
            api_keys: self.api_keys.clone(),
            adapter_dir: args.adapter_dir.clone(),
            lenient: args.lenient,
            page_history: args.page_history,
            host_names: self.host_names(),
            origin_names: lowercase(&args.host_name),
            // Checked at the start.
            allow_origins: AllowedOrigins::new(&args.allow_origin).unwrap_or_default(),
        }
    }

    /// Connections that can be open, with a warning where the system allows fewer than `--max-connections`.
    fn connections(&self) -> usize {
        let wanted = self.args.max_connections;
        let Some(files) = open_files_limit() else {
            return wanted;
        };
        let taken = connections_with(files, wanted);
        if taken < wanted {
            eprintln!(
                "warning: this process may open {files} files, so {taken} connections are taken instead of {wanted}; \
                 `ulimit -n {}` allows all",
                wanted as u64 + OTHER_FILES
            );
        }
        taken
    }

    /// Names a server without keys answers to; any, when everybody was let in on purpose.
    fn host_names(&self) -> Vec<String> {
        let args = &self.args;
        if !args.api_key.is_empty() || !args.host.is_loopback() {
            return Vec::new();
        }
        let mut names: Vec<String> = ["localhost", "127.0.0.1", "[::1]"].map(Into::into).into();
        names.push(match args.host {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        });
        names.extend(lowercase(&args.host_name));
        names
    }

    fn transport(&self) -> Result<(Transport, &'static str)> {
        #[cfg(feature = "tls")]
        if let (Some(certificate), Some(key)) = (&self.args.tls_cert, &self.args.tls_key) {
            let acceptor = crate::serve::tls::acceptor(certificate, key)?;
            return Ok((Transport::Tls(acceptor), "https"));
        }
        Ok((Transport::Plain, "http"))
    }

    pub(super) async fn serve(&self, app: Arc<App>) -> Result<()> {
        for (name, dir) in loras(&self.args)? {
            app.models
                .load(&app.engine, name, dir.to_path_buf())
                .await
                .with_context(|| format!("--lora {name}={}", dir.display()))?;
        }
        let (transport, scheme) = self.transport()?;
        let address = SocketAddr::new(self.args.host, self.args.port);
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("cannot listen at {address}; is the port in use? --port takes another")
        })?;
        let address = listener.local_addr()?;
        let stop = stop_signal()?;
        eprintln!(
            "`{}` at {scheme}://{address}, the API at {scheme}://{address}/v1",
            app.models.base()
        );
        if self.args.no_auth && !self.args.host.is_loopback() {
            eprintln!("warning: everybody who reaches {address} can use it");
        }
        let without_keys =
            self.api_keys.is_empty() && (self.args.store.is_none() || self.args.no_auth);
        if app.config.allow_origins.any() && without_keys {
            eprintln!(
                "warning: every web page that is opened where {address} can be reached can use it; give an --api-key"
            );
        }
        let exchange = match app.kept_studies() {
            Some(studies) => Some(Exchange::start(
                &self.args.exchange,
                self.args.host,
                self.args.tls_cert.is_some(),
                studies,
                &app.config.decode_limits(),
            )?),
            None => None,
        };
        let drafting = tokio::spawn(draft_studies(app.clone()));
        let drain = Duration::from_secs(self.args.drain_seconds);
        let served = http::serve(listener, transport, router(app.clone()), app, stop, drain).await;
        drafting.abort();
        if let Some(exchange) = exchange {
            // A peer that does not answer holds it for its own time-out at most.
            let _ = tokio::task::spawn_blocking(move || exchange.stop()).await;
        }
        Ok(served?)
    }
}

/// Ends with Ctrl-C, SIGTERM or SIGHUP; the next of them ends the process.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    let mut signals = {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        async move || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
            }
        }
    };
    #[cfg(not(unix))]
    let mut signals = async || {
        let _ = tokio::signal::ctrl_c().await;
    };
    Ok(async move {
        signals().await;
        tokio::spawn(async move {
            signals().await;
            eprintln!("a second signal to stop: answers are broken off");
            std::process::exit(130);
        });
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_the_files_that_may_be_open() {
        assert_eq!(connections_with(1 << 20, 1024), 1024);
        assert_eq!(connections_with(1024 + OTHER_FILES, 1024), 1024);
        assert_eq!(connections_with(1024, 1024), 928);
        assert_eq!(connections_with(64, 1024), 16);
        assert_eq!(connections_with(64, 4), 4);
        assert_eq!(connections_with(0, 4), 1);
    }
}
