//! The queue (stream) that the operations of a thread go through.

/// The queue that a thread's operations go through: GPU backends give every thread one, with memory of
/// its own, which stays allocated after the thread has ended.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    #[cfg(any(feature = "cuda", feature = "wgpu"))]
    stream: cubecl_common::stream_id::StreamId,
}

impl Queue {
    /// That of the calling thread.
    pub fn current() -> Self {
        Self {
            #[cfg(any(feature = "cuda", feature = "wgpu"))]
            stream: cubecl_common::stream_id::StreamId::current(),
        }
    }

    /// Runs `work` with its operations in this queue, whatever the thread.
    pub fn run<R>(self, work: impl FnOnce() -> R) -> R {
        #[cfg(any(feature = "cuda", feature = "wgpu"))]
        return self.stream.executes(work);
        #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
        work()
    }
}
