//! A connection of HTTP/1.1 to an address that the caller resolved, with TLS where it is wanted.

use std::{io, net::SocketAddr};

use hyper::{
    Request, Response, Uri,
    body::{Body, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Why a request to a server failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages describe each")]
pub enum ClientError {
    #[error("`{0}` is not an address of the form http://HOST:PORT or https://HOST:PORT")]
    Address(String),
    #[error("cannot reach `{host}`")]
    Reach {
        host: String,
        #[source]
        cause: io::Error,
    },
    #[error("`{0}` needs TLS; this program was built without `tls`")]
    NoTls(String),
    #[error("the connection broke off")]
    Broken(#[from] hyper::Error),
    #[error("the request cannot be sent: {0}")]
    Request(#[from] hyper::http::Error),
}

/// One open connection; it is closed when this is dropped.
pub struct Connection<T> {
    sender: http1::SendRequest<T>,
    task: tokio::task::JoinHandle<()>,
}

impl<T> Drop for Connection<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<T> Connection<T>
where
    T: Body + Send + 'static,
    T::Data: Send,
    T::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Sends one request; the connection must outlive the response's body.
    ///
    /// # Errors
    /// [`ClientError::Broken`].
    pub async fn send(&mut self, request: Request<T>) -> Result<Response<Incoming>, ClientError> {
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }
}

/// Host and port of an address; the port of the scheme when none is given.
pub fn host_and_port(uri: &Uri) -> Option<(String, u16)> {
    let host = uri.host()?;
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    let port = match uri.scheme_str() {
        Some("https") => 443,
        Some("http") => 80,
        _ => return None,
    };
    Some((host.to_owned(), uri.port_u16().unwrap_or(port)))
}

/// Value of the `Host` header.
pub fn host_header(uri: &Uri) -> String {
    uri.authority().map_or_else(String::new, |authority| {
        let text = authority.as_str();
        text.rsplit_once('@').map_or(text, |(_, host)| host).into()
    })
}

/// Connects to `address`, which the caller resolved, with TLS where `uri` starts with `https`.
///
/// # Errors
/// [`ClientError`].
pub async fn connect<T>(uri: &Uri, address: SocketAddr) -> Result<Connection<T>, ClientError>
where
    T: Body + Send + 'static,
    T::Data: Send,
    T::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let host = host_header(uri);
    let reach = |cause| ClientError::Reach {
        host: host.clone(),
        cause,
    };
    let stream = TcpStream::connect(address).await.map_err(reach)?;
    let _ = stream.set_nodelay(true);
    if uri.scheme_str() != Some("https") {
        return handshake(TokioIo::new(stream)).await;
    }
    #[cfg(feature = "tls")]
    {
        let name = host_and_port(uri).map(|(host, _)| host).unwrap_or_default();
        let stream = super::tls::connect(stream, &name).await.map_err(reach)?;
        handshake(TokioIo::new(stream)).await
    }
    #[cfg(not(feature = "tls"))]
    Err(ClientError::NoTls(host))
}

async fn handshake<T, S>(stream: S) -> Result<Connection<T>, ClientError>
where
    S: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    T: Body + Send + 'static,
    T::Data: Send,
    T::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (sender, connection) = http1::handshake(stream).await?;
    let task = tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(Connection { sender, task })
}
