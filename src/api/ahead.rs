//! Streams in tasks of their own.

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

/// A stream that goes on, one item ahead, while nobody polls it: whoever does may wait for its client for long, and what the
/// stream holds while it works, a turn or a place in a pool, others wait for. It ends when it is dropped.
pub(super) fn ahead<T: Send + 'static>(mut items: BoxStream<'static, T>) -> impl Stream<Item = T> + Send {
    let (give, mut take) = mpsc::channel(1);
    let making = async move {
        while let Ok(place) = give.reserve().await {
            let Some(item) = items.next().await else { break };
            place.send(item);
        }
    };
    let making = AbortOnDropHandle::new(tokio::spawn(making.in_current_span()));
    stream::poll_fn(move |cx| {
        let _kept = &making;
        take.poll_recv(cx)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn it_works_while_nobody_polls_it_but_no_further_than_one_item() {
        let (made, woken) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let items = stream::unfold((made.clone(), woken.clone()), |state| async move {
            tokio::task::yield_now().await;
            let number = state.0.fetch_add(1, Ordering::SeqCst);
            state.1.notify_one();
            Some((number, state))
        });
        let mut ahead = Box::pin(ahead(items.boxed()));
        woken.notified().await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(made.load(Ordering::SeqCst), 1);
        assert_eq!([ahead.next().await, ahead.next().await], [Some(0), Some(1)]);
        drop(ahead);
        while Arc::strong_count(&made) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
