//! A connection's bytes: time limits for writing, and clients that close their half.
//!
//! hyper limits the time for reading heads and [`super::body`] that for bodies; nothing limits the time
//! a client takes to read. And for hyper a closed half is a closed connection, while a client may end
//! its sending with its request and still wait for the answer.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{body::Body, http::Version};
use futures_util::FutureExt;
use hyper::{
    Request, Response,
    body::{Body as HttpBody, Bytes, Frame, Incoming, SizeHint},
    service::Service,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Interval, Sleep},
};

/// How often a connection whose client has closed its half is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// An interim response: a client that still reads passes over it, one that is gone answers with a reset.
const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// What is under way on a connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Exchange(Arc<Under>);

#[derive(Debug, Default)]
struct Under {
    /// Requests whose response is not sent.
    requests: AtomicUsize,
    /// Whether an interim response may be sent: HTTP/1.1, and the response has not begun.
    silent: AtomicBool,
}

/// One request under way.
struct OneRequest(Exchange);

impl Drop for OneRequest {
    fn drop(&mut self) {
        self.0.0.silent.store(false, Ordering::SeqCst);
        self.0.0.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Exchange {
    fn begin(&self, version: Version) -> OneRequest {
        self.0.requests.fetch_add(1, Ordering::SeqCst);
        let silent = version == Version::HTTP_11;
        self.0.silent.store(silent, Ordering::SeqCst);
        OneRequest(self.clone())
    }

    /// Whether a request is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.0.requests.load(Ordering::SeqCst) > 0
    }
}

/// A service whose requests are counted until their responses are sent.
pub(super) struct Counted<S> {
    pub(super) inner: S,
    pub(super) exchange: Exchange,
}

/// A response's body that keeps its request counted.
struct CountedBody {
    body: Body,
    _request: OneRequest,
}

impl HttpBody for CountedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<S> Service<Request<Incoming>> for Counted<S>
where
    S: Service<Request<Incoming>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let counted = self.exchange.begin(request.version());
        let response = self.inner.call(request);
        Box::pin(async move {
            let response = response.await?;
            counted.0.0.silent.store(false, Ordering::SeqCst);
            Ok(response.map(|body| {
                Body::new(CountedBody {
                    body,
                    _request: counted,
                })
            }))
        })
    }
}

/// A stream over TCP.
pub(super) trait OverTcp: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// The TCP stream.
    fn tcp(&self) -> &TcpStream;
}

impl OverTcp for TcpStream {
    fn tcp(&self) -> &TcpStream {
        self
    }
}

#[cfg(feature = "tls")]
impl OverTcp for tokio_rustls::server::TlsStream<TcpStream> {
    fn tcp(&self) -> &TcpStream {
        self.get_ref().0
    }
}

/// A stream with a time limit for writing, that withholds the end of reading while a request is under way.
pub(super) struct Wire<S> {
    stream: S,
    exchange: Exchange,
    write_timeout: Duration,
    /// Runs while nothing can be written.
    writing: Option<Pin<Box<Sleep>>>,
    /// Runs once the client has closed its half.
    half_closed: Option<Interval>,
    interim_sent: bool,
}

impl<S: OverTcp> Wire<S> {
    pub(super) fn new(stream: S, exchange: Exchange, write_timeout: Duration) -> Self {
        Self {
            stream,
            exchange,
            write_timeout,
            writing: None,
            half_closed: None,
            interim_sent: false,
        }
    }

    /// Passes a result of writing on, unless nothing could be written for too long.
    fn timed<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.writing = None;
            return written;
        }
        let limit = self.write_timeout;
        let sleep = self
            .writing
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(sleep.poll_unpin(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// After the end of reading: waits for the response to be sent, or for a sign that nobody reads it.
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.exchange.is_busy() {
            return Poll::Ready(Ok(()));
        }
        let mut interval = self
            .half_closed
            .take()
            .unwrap_or_else(|| tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK));
        let mut looked = Ok(());
        while looked.is_ok() && interval.poll_tick(context).is_ready() {
            looked = self.look(context);
        }
        self.half_closed = Some(interval);
        match looked {
            Ok(()) if self.exchange.is_busy() => Poll::Pending,
            looked => Poll::Ready(looked),
        }
    }

    fn look(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if let Ok(Some(error)) = self.stream.tcp().take_error() {
            return Err(error);
        }
        let silent = self.exchange.0.silent.load(Ordering::SeqCst);
        if silent && !self.interim_sent && self.writing.is_none() {
            self.interim_sent = true;
            match Pin::new(&mut self.stream).poll_write(context, INTERIM) {
                Poll::Ready(Ok(written)) if written < INTERIM.len() => {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Ready(Ok(_)) => {
                    let _ = Pin::new(&mut self.stream).poll_flush(context);
                }
                Poll::Pending => {}
            }
        }
        Ok(())
    }
}

impl<S: OverTcp> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.half_closed.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
            if buffer.filled().len() > before || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        self.poll_end(context)
    }
}

impl<S: OverTcp> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.timed(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.timed(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.timed(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.timed(context, shut)
    }
}
