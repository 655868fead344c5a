//! Connections: accepted, held to their limits, ended in good order.

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{AbortHandle, JoinSet},
};

use super::{
    App,
    auth::Peer,
    error::ApiError,
    studies::identity::ConnectedFrom,
    wire::{Counted, Exchange, OverTcp, Wire},
};

/// Largest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// How long after a refused `accept` the next one is tried: at first, and after many.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Time between two warnings about refused connections.
const WARN_AGAIN: Duration = Duration::from_secs(60);

/// Connections beyond the limits that are answered all the same, in all and of one address: those who
/// look after the server must learn that it is full, and others why they are refused.
pub const SPARE_CONNECTIONS: usize = 32;
const SPARE_OF_ADDRESS: usize = 8;

/// Time for such a connection to send its request and to read the answer, each.
const SPARE_TIMEOUT: Duration = Duration::from_secs(2);

/// What is answered on such a connection.
const SPARE_PATHS: [&str; 5] = ["/health", "/healthz", "/readyz", "/ping", "/metrics"];

/// Time to send the error event of answers that are broken off.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Makes a connection's stream out of an accepted one: plain, or TLS.
#[derive(Clone)]
pub enum Transport {
    /// As accepted.
    Plain,
    /// TLS.
    #[cfg(feature = "tls")]
    Tls(tokio_rustls::TlsAcceptor),
}

/// Serves until `stop` comes or the engine ends, then lets running requests finish for at most `drain`.
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
    let places = Places::default();
    let (closing, close) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut spare: Vec<(u64, AbortHandle)> = Vec::new();
    let mut refused = 0u32;
    let mut warned: Option<Instant> = None;
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            _ = app.engine.ended() => break,
            accepted = listener.accept() => accepted,
        };
        // Reaps those that are over, so that the set does not grow.
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, address)) => {
                refused = 0;
                let place = places.take(&app, address.ip());
                let is_spare = place.is_none();
                let connection = Connection {
                    transport: transport.clone(),
                    router: router.clone(),
                    app: app.clone(),
                    address,
                    close: close.clone(),
                    exchange: Exchange::default(),
                    place,
                };
                let handle = connections.spawn(connection.run(stream));
                if is_spare {
                    make_room(&mut spare, Peer::new(address.ip()).client);
                    spare.push((Peer::new(address.ip()).client, handle));
                }
            }
            Err(error) => {
                // Out of file descriptors, most likely; others must close first.
                if warned.is_none_or(|last| last.elapsed() >= WARN_AGAIN) {
                    warned = Some(Instant::now());
                    log::warn!("connections cannot be accepted: {error}; raise `ulimit -n`");
                }
                let pause = SHORTEST_PAUSE.saturating_mul(2u32.saturating_pow(refused));
                refused = refused.saturating_add(1);
                tokio::select! {
                    () = &mut stop => break,
                    () = tokio::time::sleep(pause.min(LONGEST_PAUSE)) => {}
                }
            }
        }
    }
    drop(listener);
    app.engine.drain();
    let _ = closing.send(true);
    log::info!("stopping: {} connection(s) open", connections.len());
    let mut all = async || {
        while connections.join_next().await.is_some() {}
    };
    if tokio::time::timeout(drain, all()).await.is_err() {
        log::warn!("stopping: time is up, answers are broken off");
        app.engine.abort();
        let _ = tokio::time::timeout(LAST_EVENTS, all()).await;
    }
    Ok(())
}

/// Ends the oldest spare connections where there are too many, in all or of one address.
fn make_room(spare: &mut Vec<(u64, AbortHandle)>, address: u64) {
    spare.retain(|(_, handle)| !handle.is_finished());
    let of_address = spare.iter().filter(|(other, _)| *other == address).count();
    let oldest = if of_address >= SPARE_OF_ADDRESS {
        spare.iter().position(|(other, _)| *other == address)
    } else if spare.len() >= SPARE_CONNECTIONS {
        Some(0)
    } else {
        None
    };
    if let Some(oldest) = oldest {
        spare.remove(oldest).1.abort();
    }
}

/// Open connections, by address.
#[derive(Clone, Default)]
struct Places(Arc<Mutex<HashMap<u64, usize>>>);

/// The place of one; it is given back when this is dropped.
struct Place {
    places: Places,
    address: u64,
}

impl Places {
    /// A place, unless there are too many connections, in all or of this address.
    fn take(&self, app: &App, address: IpAddr) -> Option<Place> {
        let of_proxy = app.config.is_proxy(address);
        let address = Peer::new(address).client;
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = open.get(&address).copied().unwrap_or(0);
        let full = open.values().sum::<usize>() >= app.config.max_connections
            || (of_address >= app.config.max_connections_per_address && !of_proxy);
        if full {
            return None;
        }
        *open.entry(address).or_default() += 1;
        Some(Place {
            places: self.clone(),
            address,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
    }
}

struct Connection {
    transport: Transport,
    router: Router,
    app: Arc<App>,
    address: SocketAddr,
    close: watch::Receiver<bool>,
    exchange: Exchange,
    /// `None` for a spare connection.
    place: Option<Place>,
}

/// Counts a connection for as long as it is kept.
struct Open(Arc<App>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

impl Connection {
    async fn run(self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        self.app.metrics.connections.inc();
        let _open = Open(self.app.clone());
        match self.transport.clone() {
            Transport::Plain => self.speak(stream).await,
            #[cfg(feature = "tls")]
            Transport::Tls(acceptor) => {
                let limit = self.timeout(self.app.config.read_timeout);
                if let Ok(Ok(stream)) = tokio::time::timeout(limit, acceptor.accept(stream)).await {
                    self.speak(stream).await;
                }
            }
        }
    }

    /// A time limit, shorter on a spare connection.
    fn timeout(&self, limit: Duration) -> Duration {
        match self.place {
            Some(_) => limit,
            None => limit.min(SPARE_TIMEOUT),
        }
    }

    async fn speak<S: OverTcp>(mut self, stream: S) {
        let config = &self.app.config;
        let is_spare = self.place.is_none();
        let mut router = self.router.clone();
        if is_spare {
            router = router.layer(from_fn(refuse_most));
        }
        let address = self.address.ip();
        let proxies = config.is_proxy(address).then(|| self.app.clone());
        let service = Counted {
            inner: TowerToHyperService::new(router.layer(from_fn(
                move |mut request: Request, next: Next| {
                    let client = proxies.as_ref().and_then(|app| {
                        forwarded_for(request.headers(), |address| app.config.is_proxy(address))
                    });
                    let peer = Peer::new(client.unwrap_or(address));
                    request.extensions_mut().insert(peer);
                    request.extensions_mut().insert(ConnectedFrom(address));
                    next.run(request)
                },
            ))),
            exchange: self.exchange.clone(),
        };
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.timeout(config.read_timeout))
            .keep_alive(!is_spare)
            .max_buf_size(MAX_HEAD_BYTES);
        let write_timeout = self.timeout(config.write_timeout);
        let wire = Wire::new(stream, self.exchange.clone(), write_timeout);
        let connection = builder.serve_connection(TokioIo::new(wire), service);
        tokio::pin!(connection);
        tokio::select! {
            // Errors of a connection are the client's: it hung up, or sent no HTTP.
            _ = connection.as_mut() => return,
            _ = self.close.wait_for(|close| *close) => connection.as_mut().graceful_shutdown(),
        }
        // A request that has come is answered; a connection without one is closed.
        while tokio::time::timeout(Duration::from_secs(1), connection.as_mut())
            .await
            .is_err()
        {
            if !self.exchange.is_busy() {
                return;
            }
        }
    }
}

/// On a spare connection: answers the paths that show the server's state.
async fn refuse_most(request: Request, next: Next) -> Response {
    if SPARE_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let mut response = ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "too many connections are open, in all or of this address; try again in a moment",
    )
    .with_code("too_many_connections")
    .into_response();
    let id = format!("{:032x}", rand::random::<u128>());
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", id);
    }
    response
}

/// The client a proxy speaks for: the last address of `X-Forwarded-For` that is no proxy itself.
fn forwarded_for(headers: &HeaderMap, is_proxy: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let lists: Vec<&str> = headers
        .get_all("x-forwarded-for")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .collect();
    lists
        .iter()
        .rev()
        .flat_map(|list| list.rsplit(','))
        .map_while(|address| address.trim().parse::<IpAddr>().ok())
        .find(|address| !is_proxy(*address))
}

/// Refuses a request that does not name one host.
///
/// # Errors
/// [`ApiError`] of status 400.
///
/// Source: RFC 9112, section 3.2.
pub(super) fn check_host(request: &Request) -> Result<(), ApiError> {
    let hosts = request.headers().get_all(header::HOST).iter().count();
    let needed = request.version() == axum::http::Version::HTTP_11;
    if hosts > 1 || (hosts == 0 && needed) {
        return Err(ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the request has {hosts} `Host` headers, expected one"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_of_a_proxy_is_the_last_address_that_is_none() {
        let proxy: IpAddr = "10.0.0.1".parse().unwrap();
        let of = |lists: &[&str]| {
            let headers = lists
                .iter()
                .map(|list| ("x-forwarded-for".parse().unwrap(), list.parse().unwrap()))
                .collect::<HeaderMap>();
            forwarded_for(&headers, |address| address == proxy).map(|address| address.to_string())
        };
        assert_eq!(of(&["192.0.2.9, 192.0.2.1"]).as_deref(), Some("192.0.2.1"));
        assert_eq!(of(&["192.0.2.1, 10.0.0.1"]).as_deref(), Some("192.0.2.1"));
        assert_eq!(
            of(&["192.0.2.9", "2001:db8::1"]).as_deref(),
            Some("2001:db8::1")
        );
        assert_eq!(of(&["192.0.2.1, nobody"]), None);
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn a_new_spare_connection_ends_the_oldest_of_its_address() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut spare = Vec::new();
            let mut open = |address| {
                let task = tokio::spawn(std::future::pending::<()>());
                make_room(&mut spare, address);
                spare.push((address, task.abort_handle()));
                task
            };
            let first = open(1);
            let other = open(2);
            let more: Vec<_> = (0..SPARE_OF_ADDRESS).map(|_| open(1)).collect();
            assert!(first.await.unwrap_err().is_cancelled());
            assert!(!other.is_finished() && !more[0].is_finished());
        });
    }
}
