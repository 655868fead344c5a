//! Connections: accepted, held to their limits, ended in good order.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

use super::{App, auth::Peer};

/// Largest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// How long after a refused `accept` the next one is tried.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Makes a connection's stream out of an accepted one: plain, or TLS.
#[derive(Clone)]
pub enum Transport {
    /// As accepted.
    Plain,
    /// TLS.
    #[cfg(feature = "tls")]
    Tls(tokio_rustls::TlsAcceptor),
}

/// Serves until `stop` comes, then lets running requests finish for at most `drain`.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: TcpListener,
    transport: Transport,
    router: Router,
    app: Arc<App>,
    stop: impl Future<Output = ()>,
    drain: Duration,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(app.config.max_connections));
    let (closing, close) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(stop);
    loop {
        // Connections beyond the limit wait in the system's queue.
        let place = tokio::select! {
            () = &mut stop => break,
            place = places.clone().acquire_owned() => match place {
                Ok(place) => place,
                Err(_) => break,
            },
        };
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
        };
        // Reaps those that are over, so that the set does not grow.
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, address)) => {
                let connection = Connection {
                    transport: transport.clone(),
                    router: router.clone(),
                    app: app.clone(),
                    address,
                    close: close.clone(),
                    _place: place,
                };
                connections.spawn(connection.run(stream));
            }
            Err(error) => {
                // Out of file descriptors, most likely; others must close first.
                log::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    app.engine.drain();
    let _ = closing.send(true);
    log::info!("stopping: {} connection(s) open", connections.len());
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(drain, all).await.is_err() {
        log::warn!("stopping: time is up, answers are broken off");
        app.engine.abort();
    }
    Ok(())
}

struct Connection {
    transport: Transport,
    router: Router,
    app: Arc<App>,
    address: SocketAddr,
    close: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        self.app.metrics.connections.add(1);
        let metrics = self.app.metrics.clone();
        match self.transport.clone() {
            Transport::Plain => self.speak(stream).await,
            #[cfg(feature = "tls")]
            Transport::Tls(acceptor) => {
                let limit = self.app.config.read_timeout;
                if let Ok(Ok(stream)) = tokio::time::timeout(limit, acceptor.accept(stream)).await {
                    self.speak(stream).await;
                }
            }
        }
        metrics.connections.subtract(1);
    }

    async fn speak<S>(mut self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let peer = Peer::new(self.address.ip());
        let service = TowerToHyperService::new(self.router.clone().layer(Extension(peer)));
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.app.config.read_timeout)
            .max_buf_size(MAX_HEAD_BYTES);
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        tokio::select! {
            // What goes wrong on a connection is the other end's affair.
            _ = connection.as_mut() => return,
            _ = self.close.wait_for(|close| *close) => connection.as_mut().graceful_shutdown(),
        }
        let _ = connection.await;
    }
}
