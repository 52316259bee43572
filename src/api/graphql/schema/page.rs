//! What connections have in common: arguments, page info, cost.

use async_graphql::SimpleObject;

use crate::domain::list::PAGE_SIZE_MAX;
use crate::domain::{Error, Result};

/// Page size when neither `first` nor `last` is given.
pub(super) const PAGE_SIZE: i32 = 50;

/// Where the neighbouring pages are.
#[derive(Clone, Debug, Default, SimpleObject)]
pub struct PageInfo {
    /// Whether more follow; with `last`, whether the page was reached by a cursor.
    pub has_next_page: bool,
    /// Whether more come before; with `first`, whether the page was reached by a cursor.
    pub has_previous_page: bool,
    /// For `before`; null on an empty page.
    pub start_cursor: Option<String>,
    /// For `after`; null on an empty page.
    pub end_cursor: Option<String>,
}

/// The arguments of a connection, checked.
#[derive(Debug, PartialEq)]
pub(super) struct PageArgs<C> {
    /// 1 to 100.
    pub size: usize,
    /// From where, and which way.
    pub way: Way<C>,
}

/// Which way to page.
#[derive(Debug, PartialEq)]
pub(super) enum Way<C> {
    /// `first`, `after`.
    Forward(Option<C>),
    /// `last`, `before`.
    Backward(Option<C>),
}

impl<C> PageArgs<C> {
    /// Checks that the arguments go one way, and reads the cursor.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the argument.
    pub fn new(
        (first, after): (Option<i32>, Option<String>),
        (last, before): (Option<i32>, Option<String>),
        read: impl Fn(&'static str, &str) -> Result<C>,
    ) -> Result<Self> {
        let forward = first.is_some() || after.is_some();
        let backward = last.is_some() || before.is_some();
        if forward && backward {
            return Err(Error::invalid("last", "cannot be combined with first and after; page one way"));
        }
        if backward {
            let cursor = before.map(|text| read("before", &text)).transpose()?;
            return Ok(Self { size: size("last", last)?, way: Way::Backward(cursor) });
        }
        let cursor = after.map(|text| read("after", &text)).transpose()?;
        Ok(Self { size: size("first", first)?, way: Way::Forward(cursor) })
    }
}

fn size(name: &'static str, asked: Option<i32>) -> Result<usize> {
    let size =
        usize::try_from(asked.unwrap_or(PAGE_SIZE)).ok().filter(|size| (1..=PAGE_SIZE_MAX).contains(size));
    size.ok_or_else(|| Error::invalid(name, format!("must be 1 to {PAGE_SIZE_MAX}")))
}

/// Points of a connection: its fields as often as its page is long. A size that will be refused costs what the
/// largest page does.
pub(super) fn cost(first: Option<i32>, last: Option<i32>, child: usize) -> usize {
    let asked = first.or(last).unwrap_or(PAGE_SIZE);
    let size = usize::try_from(asked).map_or(1, |size| size.clamp(1, PAGE_SIZE_MAX));
    child.saturating_mul(size).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(_: &'static str, text: &str) -> Result<String> {
        Ok(text.to_owned())
    }

    #[test]
    fn a_page_goes_one_way() {
        let after = PageArgs::new((None, Some("a".to_owned())), (None, None), read).expect("forward");
        assert_eq!(after, PageArgs { size: 50, way: Way::Forward(Some("a".to_owned())) });
        let last = PageArgs::new((None, None), (Some(3), None), read).expect("backward");
        assert_eq!(last, PageArgs { size: 3, way: Way::Backward(None) });
        assert!(PageArgs::new((Some(1), None), (Some(1), None), read).is_err());
        assert!(PageArgs::new((Some(1), None), (None, Some("b".to_owned())), read).is_err());
    }

    #[test]
    fn a_page_holds_one_to_a_hundred() {
        for (size, fits) in
            [(0, false), (-1, false), (1, true), (100, true), (101, false), (1_000_000_000, false)]
        {
            assert_eq!(PageArgs::new((Some(size), None), (None, None), read).is_ok(), fits, "{size}");
        }
        assert_eq!(cost(Some(1_000_000_000), None, 3), 301);
        assert_eq!(cost(None, Some(2), 3), 7);
    }
}
