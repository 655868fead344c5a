//! A small HTTP/1.1 client: for images from the web, for `infer --server` and for `bench serve`.

use std::{io, net::SocketAddr};

use axum::http::{Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response,
    body::{Body, Bytes, Incoming},
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
    Request(#[from] axum::http::Error),
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

/// A server of ours, by its address.
#[derive(Debug, Clone)]
pub struct Server {
    base: Uri,
    api_key: Option<String>,
}

impl Server {
    /// A server at `http://HOST:PORT`, with a path in front of `/v1` where there is one.
    ///
    /// # Errors
    /// [`ClientError::Address`].
    pub fn new(address: &str, api_key: Option<String>) -> Result<Self, ClientError> {
        let wrong = || ClientError::Address(address.to_owned());
        let trimmed = address.trim_end_matches('/').trim_end_matches("/v1");
        let base: Uri = trimmed.parse().map_err(|_| wrong())?;
        host_and_port(&base).ok_or_else(wrong)?;
        Ok(Self { base, api_key })
    }

    /// Connects to the first address that answers.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect(&self) -> Result<Connection<Full<Bytes>>, ClientError> {
        let host = host_header(&self.base);
        let (name, port) =
            host_and_port(&self.base).ok_or_else(|| ClientError::Address(host.clone()))?;
        let reach = |cause| ClientError::Reach {
            host: host.clone(),
            cause,
        };
        let addresses = tokio::net::lookup_host((name.as_str(), port))
            .await
            .map_err(reach)?;
        let mut last = reach(io::Error::new(
            io::ErrorKind::NotFound,
            "the name has no address",
        ));
        for address in addresses {
            match connect(&self.base, address).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// A request with a JSON body, or a `GET` without one.
    ///
    /// # Errors
    /// [`ClientError::Request`].
    pub fn request(
        &self,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let prefix = self.base.path().trim_end_matches('/');
        let mut request = Request::builder()
            .method(if body.is_some() { "POST" } else { "GET" })
            .uri(format!("{prefix}{path}"))
            .header(header::HOST, host_header(&self.base));
        if let Some(key) = &self.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        Ok(request.body(Full::from(body.unwrap_or_default()))?)
    }

    /// Sends one request and reads the whole response: status and body.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn call(
        &self,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(u16, Bytes), ClientError> {
        let mut connection = self.connect().await?;
        let response = connection.send(self.request(path, body)?).await?;
        let status = response.status().as_u16();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

/// Cuts a stream of server-sent events into the data of each.
#[derive(Debug, Default)]
pub struct EventLines {
    held: Vec<u8>,
}

impl EventLines {
    /// Takes bytes and gives the data of every event that is whole.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.held.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.held.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = self.held.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&event);
            let data: Vec<&str> = text
                .lines()
                .filter_map(|line| line.strip_prefix("data:"))
                .map(str::trim_start)
                .collect();
            if !data.is_empty() {
                events.push(data.join("\n"));
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_cut_wherever_the_bytes_are() {
        let text = ": hello\n\ndata: {\"a\":\"心\"}\n\ndata: [DONE]\n\n".as_bytes();
        for size in 1..text.len() {
            let mut lines = EventLines::default();
            let found: Vec<String> = text
                .chunks(size)
                .flat_map(|part| lines.push(part))
                .collect();
            assert_eq!(found, ["{\"a\":\"心\"}", "[DONE]"], "by {size}");
        }
    }

    #[test]
    fn an_address_may_end_in_v1() {
        for address in ["http://a:7860", "http://a:7860/", "http://a:7860/v1"] {
            let server = Server::new(address, None).unwrap();
            let request = server.request("/v1/models", None).unwrap();
            assert_eq!(request.uri(), "/v1/models");
            assert_eq!(request.headers()[header::HOST], "a:7860");
        }
        assert!(Server::new("a:7860", None).is_err());
        assert!(Server::new("ftp://a", None).is_err());
    }
}
