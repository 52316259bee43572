//! The query of the list route.

use std::collections::HashMap;

use crate::api::error::Failure;
use crate::api::period::period;
use crate::domain::list::{Anchor, PAGE_SIZE_DEFAULT};
use crate::domain::{
    Cursor, Error, ExternalId, Filter, PageRequest, Status, StatusSet, Timestamp, Violation,
};

/// A read query.
#[derive(Debug, PartialEq)]
pub struct ListQuery {
    /// What to list.
    pub filter: Filter,
    /// Which page of it.
    pub page: PageRequest,
    /// How many pages the caller has come through; see [`Step`].
    pub step: u64,
}

/// A cursor as this route writes it: how many pages led here, a dot, the place.
///
/// The SDK keeps the cursors of every page it went through and sends the last one of each way together, going
/// forward as well as back. The greater number tells which one is meant.
#[derive(Debug, PartialEq)]
struct Step<C> {
    number: u64,
    cursor: C,
}

impl<C> Step<C> {
    fn decode(field: &str, text: &str, read: ReadCursor<C>) -> crate::domain::Result<Self> {
        let (number, cursor) = text.split_once('.').unwrap_or(("", text));
        let cursor = read(field, cursor)?;
        match number.parse() {
            Ok(number) => Ok(Self { number, cursor }),
            Err(_) => Err(Error::malformed(field, "is not a cursor of this list")),
        }
    }
}

/// The text of a cursor on the page that `step` pages led to.
pub fn encode(step: u64, cursor: &str) -> String {
    format!("{step}.{cursor}")
}

type ReadCursor<C> = fn(&str, &str) -> crate::domain::Result<C>;

/// A page that a query asks for.
pub(super) struct Asked<C> {
    /// How many rows; checked by nobody yet.
    pub size: usize,
    /// From where, and which way; newer when true.
    pub anchor: (Option<C>, bool),
    /// See [`Step`].
    pub step: u64,
}

pub(super) type Faults = Vec<Violation>;
pub(super) type Fields = HashMap<String, Vec<String>>;

/// The values of a query by name, whether repeated with or without brackets.
pub(super) fn fields(query: &str) -> Fields {
    let mut fields = Fields::new();
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        let name = name.strip_suffix("[]").unwrap_or(&name).to_owned();
        fields.entry(name).or_default().push(value.into_owned());
    }
    fields
}

/// Reads the query. `both_cursors`: from the SDK, which sends both and means the newer one.
pub fn parse(query: &str, now: Timestamp, both_cursors: bool) -> Result<ListQuery, Failure> {
    let fields = fields(query);
    let mut faults = Faults::new();
    let filter = filter(&fields, now, &mut faults);
    let page = note(page(&fields, both_cursors), &mut faults);
    match page {
        Some((page, step)) if faults.is_empty() => Ok(ListQuery { filter, page, step }),
        _ => Err(Failure::query(&faults)),
    }
}

pub(super) fn one<'a>(fields: &'a Fields, name: &str) -> Option<&'a str> {
    fields.get(name).and_then(|values| values.last()).map(String::as_str).filter(|value| !value.is_empty())
}

/// The parts of comma-joined values, and each whole value too, whose comma may be its own.
pub(super) fn many(fields: &Fields, name: &str) -> Vec<String> {
    distinct(wholes(fields, name).flat_map(|whole| split(whole).chain([whole])))
}

/// The parts of comma-joined values only: whoever lists by tasks must be allowed to read each of them.
fn parts(fields: &Fields, name: &str) -> Vec<String> {
    distinct(wholes(fields, name).flat_map(split))
}

fn wholes<'a>(fields: &'a Fields, name: &str) -> impl Iterator<Item = &'a str> {
    fields.get(name).into_iter().flatten().map(String::as_str)
}

fn split(whole: &str) -> impl Iterator<Item = &str> {
    whole.split(',').map(str::trim)
}

fn distinct<'a>(texts: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut values: Vec<String> = Vec::new();
    for text in texts.filter(|text| !text.is_empty()) {
        if !values.iter().any(|value| value == text) {
            values.push(text.to_owned());
        }
    }
    values
}

pub(super) fn note<T>(result: crate::domain::Result<T>, faults: &mut Faults) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Malformed(fault)) => {
            faults.push(fault);
            None
        }
        Err(other) => {
            faults.push(Violation { field: String::new(), message: other.detail() });
            None
        }
    }
}

fn filter(fields: &Fields, now: Timestamp, faults: &mut Faults) -> Filter {
    let mut statuses = Vec::new();
    for word in fields.get("filter[status]").into_iter().flatten().flat_map(|value| value.split(',')) {
        let word = word.trim();
        match Status::parse(word) {
            Some(status) => statuses.push(status),
            None if word.is_empty() => {}
            None => faults.push(Violation {
                field: "filter[status]".to_owned(),
                message: "must be ACTIVE, CLOSED or EXPIRED".to_owned(),
            }),
        }
    }
    let asked = many(fields, "filter[externalId]");
    let external_ids: Vec<_> = asked.iter().filter_map(|text| ExternalId::parse(text).ok()).collect();
    if external_ids.is_empty() && !asked.is_empty() {
        faults.push(Violation {
            field: "filter[externalId]".to_owned(),
            message: "is not an external id".to_owned(),
        });
    }
    let (created_from, created_to) = created(fields, now, faults);
    Filter {
        kinds: many(fields, "filter[type]"),
        tags_any: many(fields, "filter[tags]"),
        tags_all: Vec::new(),
        task_identifiers: parts(fields, "filter[taskIdentifier]"),
        external_ids,
        statuses: StatusSet::new(statuses),
        created_from,
        created_to,
    }
}

/// The span that `filter[createdAt]` names.
pub(super) fn created(
    fields: &Fields,
    now: Timestamp,
    faults: &mut Faults,
) -> (Option<Timestamp>, Option<Timestamp>) {
    let mut date = |name: &str| {
        let text = one(fields, name)?;
        let read = text.parse().ok().map(Timestamp::from_millis).or_else(|| Timestamp::parse(text));
        if read.is_none() {
            faults.push(Violation { field: name.to_owned(), message: "is not a date".to_owned() });
        }
        read
    };
    let (from, created_to) = (date("filter[createdAt][from]"), date("filter[createdAt][to]"));
    let since = one(fields, "filter[createdAt][period]").and_then(|text| {
        let period = period(text);
        if period.is_none() {
            faults.push(Violation {
                field: "filter[createdAt][period]".to_owned(),
                message: "must be a number and one of s, m, h, d, w".to_owned(),
            });
        }
        period.map(|period| now.minus(period))
    });
    (from.max(since), created_to)
}

fn page(fields: &Fields, both: bool) -> crate::domain::Result<(PageRequest, u64)> {
    let Asked { size, anchor, step } = asked(fields, both, Cursor::decode)?;
    let anchor = match anchor {
        (cursor, false) => Anchor::After(cursor),
        (cursor, true) => Anchor::Before(cursor),
    };
    Ok((PageRequest::new(size, anchor)?, step))
}

/// Reads `page[size]`, `page[after]` and `page[before]`.
pub(super) fn asked<C>(fields: &Fields, both: bool, read: ReadCursor<C>) -> crate::domain::Result<Asked<C>> {
    let size = match one(fields, "page[size]") {
        None => PAGE_SIZE_DEFAULT,
        Some(text) => text.parse().unwrap_or(0),
    };
    let cursor = |name| one(fields, name).map(|text| Step::decode(name, text, read)).transpose();
    let (after, before) = (cursor("page[after]")?, cursor("page[before]")?);
    let step = after.iter().chain(&before).map(|step| step.number).max().unwrap_or_default();
    let anchor = match (after, before) {
        (Some(_), Some(_)) if !both => {
            return Err(Error::malformed("page", "takes either \"after\" or \"before\""));
        }
        (Some(after), Some(before)) if after.number > before.number => (Some(after.cursor), false),
        (_, Some(before)) => (Some(before.cursor), true),
        (after, None) => (after.map(|after| after.cursor), false),
    };
    Ok(Asked { size, anchor, step })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::SessionId;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000_000);

    fn read(query: &str) -> Result<ListQuery, Failure> {
        parse(query, NOW, false)
    }

    fn cursor(millis: i64) -> Cursor {
        Cursor { created_at: Timestamp::from_millis(millis), id: SessionId::from_stored("session_a") }
    }

    #[test]
    fn joined_repeated_and_bracketed_values_are_all_read() {
        for query in
            ["filter[tags]=a,b", "filter%5Btags%5D=a&filter[tags]=b", "filter[tags][]=a&filter[tags][]=b"]
        {
            let tags = read(query).expect(query).filter.tags_any;
            assert!(tags.starts_with(&["a".to_owned(), "b".to_owned()]), "{query}: {tags:?}");
        }
        assert_eq!(read("filter[tags]=a,b").expect("reads").filter.tags_any, ["a", "b", "a,b"]);
        let statuses = read("filter[status]=ACTIVE,CLOSED").expect("reads").filter.statuses;
        assert_eq!(statuses.as_slice(), [Status::Active, Status::Closed]);
    }

    #[test]
    fn both_cursors_are_read_only_from_the_sdk_and_the_newer_one_wins() {
        let query = |after, before| {
            format!(
                "page[after]={}&page[before]={}",
                encode(after, &cursor(1).encode()),
                encode(before, &cursor(2).encode())
            )
        };
        assert_eq!(read(&query(1, 2)).expect_err("both").status.as_u16(), 400);
        for (after, before, anchor) in [
            (1, 2, Anchor::Before(Some(cursor(2)))),
            (3, 2, Anchor::After(Some(cursor(1)))),
            (2, 2, Anchor::Before(Some(cursor(2)))),
        ] {
            let read = parse(&query(after, before), NOW, true).expect("reads");
            assert_eq!((read.page.anchor, read.step), (anchor, after.max(before)));
        }
        for text in ["", "1", "1.", "x.AQ", &cursor(1).encode(), &format!("-1.{}", cursor(1).encode())] {
            assert!(Step::decode("page[after]", text, Cursor::decode).is_err(), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for query in [
            "page[size]=0",
            "page[size]=101",
            "page[size]=x",
            "page[after]=x",
            "filter[status]=active",
            "filter[createdAt][period]=soon",
            "filter[createdAt][from]=soon",
            "filter[externalId]=session_a",
        ] {
            let failure = read(query).expect_err(query);
            assert_eq!((failure.status.as_u16(), failure.message.as_str()), (400, "Query Error"), "{query}");
        }
        assert_eq!(read("").expect("reads").page, PageRequest::first(20));
    }

    #[test]
    fn times_are_milliseconds_dates_or_periods() {
        let filter =
            read("filter[createdAt][from]=5&filter[createdAt][to]=1970-01-01").expect("reads").filter;
        assert_eq!(filter.created_from, Some(Timestamp::from_millis(5)));
        assert_eq!(filter.created_to, Some(Timestamp::from_millis(0)));
        let filter = read("filter[createdAt][period]=1h").expect("reads").filter;
        assert_eq!(filter.created_from, Some(NOW.minus(Duration::from_secs(3600))));
    }
}
