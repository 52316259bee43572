//! Streams in tasks of their own.

use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::task::{Poll, ready};

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

/// A stream that works on the next item, once it was asked for it, even while nobody polls it: whoever does may wait for its
/// client for long, and what the stream holds while it works, a turn or a place in a pool, others wait for. It ends when it is
/// dropped, and panics as the stream does.
pub(super) fn in_own_task<T: Send + 'static>(
    mut items: BoxStream<'static, T>,
) -> impl Stream<Item = T> + Send {
    let (ask, mut asked) = mpsc::channel(1);
    let (give, mut take) = mpsc::channel(1);
    let making = async move {
        while asked.recv().await.is_some() {
            let Some(item) = items.next().await else { break };
            if give.send(item).await.is_err() {
                break;
            }
        }
    };
    let mut making = AbortOnDropHandle::new(tokio::spawn(making.in_current_span()));
    let mut is_asked = false;
    stream::poll_fn(move |cx| {
        if !is_asked {
            // There is a place: what was asked for before has been taken.
            is_asked = ask.try_send(()).is_ok();
        }
        let item = ready!(take.poll_recv(cx));
        is_asked = false;
        if item.is_none()
            && let Poll::Ready(Err(error)) = Pin::new(&mut making).poll(cx)
            && error.is_panic()
        {
            resume_unwind(error.into_panic());
        }
        Poll::Ready(item)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn it_works_on_what_was_asked_for_while_nobody_polls_it_and_on_nothing_more() {
        let (made, woken) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let items = stream::unfold((made.clone(), woken.clone()), |state| async move {
            tokio::task::yield_now().await;
            let number = state.0.fetch_add(1, Ordering::SeqCst);
            state.1.notify_one();
            Some((number, state))
        });
        let mut items = Box::pin(in_own_task(items.boxed()));
        let idle = async || {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        };
        idle().await;
        assert_eq!(made.load(Ordering::SeqCst), 0, "nothing was asked for");
        assert!(futures_util::poll!(items.next()).is_pending());
        woken.notified().await;
        assert_eq!(items.next().await, Some(0));
        idle().await;
        assert_eq!(made.load(Ordering::SeqCst), 1, "nothing more was asked for");
        assert_eq!(items.next().await, Some(1));
        drop(items);
        while Arc::strong_count(&made) > 1 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    #[should_panic(expected = "a fault")]
    async fn it_panics_as_the_stream_does() {
        let items = stream::once(async {
            if true {
                panic!("a fault")
            }
        });
        in_own_task(items.boxed()).collect::<Vec<()>>().await;
    }
}
