//! A small client of servers with OpenAI's API: for `infer --server` and for `bench serve`.

use std::io;

use axum::http::{Uri, header};
use http_body_util::Full;
use hyper::{Request, body::Bytes};

pub use crate::base::web::connection::{ClientError, Connection};
use crate::base::web::connection::{connect, host_and_port, host_header};

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
    #[cfg(test)]
    pub async fn call(
        &self,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<(u16, Bytes), ClientError> {
        use http_body_util::BodyExt;

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
