//! Content negotiation, as "GraphQL over HTTP" asks for it.

use http::HeaderMap;
use http::header::ACCEPT;

/// Forms of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Media {
    /// `application/graphql-response+json`: the status tells whether the request was executed.
    GraphqlResponse,
    /// `application/json`: 200 for every well-formed request.
    Json,
    /// `text/event-stream`
    EventStream,
    /// `multipart/mixed` with `subscriptionSpec=1.0`
    Multipart,
}

/// What a client accepts, the weight of each form in thousandths; zero is not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Accept {
    graphql_response: u16,
    json: u16,
    event_stream: u16,
    multipart: u16,
}

impl Accept {
    /// Reads the header. Without one any JSON will do.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut accept = Self::default();
        let mut any = false;
        for range in headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).flat_map(ranges) {
            any = true;
            accept.take(range);
        }
        if any { accept } else { Self { json: 1000, ..accept } }
    }

    fn take(&mut self, range: &str) {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let (mut weight, mut is_subscription, mut utf8) = (1000, false, true);
        for parameter in parts {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "q" => weight = thousandths(value),
                "subscriptionspec" => is_subscription = value == "1.0",
                "charset" => utf8 = value.eq_ignore_ascii_case("utf-8"),
                _ => {}
            }
        }
        if !utf8 {
            return;
        }
        let form = match kind.as_str() {
            "application/graphql-response+json" => &mut self.graphql_response,
            "application/json" | "application/*" | "*/*" => &mut self.json,
            "text/event-stream" | "text/*" => &mut self.event_stream,
            "multipart/mixed" if is_subscription => &mut self.multipart,
            _ => return,
        };
        *form = weight.max(*form);
    }

    /// The form for a single result.
    pub fn single(&self) -> Option<Media> {
        let forms = [
            (self.event_stream, Media::EventStream),
            (self.json, Media::Json),
            (self.graphql_response, Media::GraphqlResponse),
        ];
        heaviest(&forms)
    }

    /// The form for a stream of results.
    pub fn stream(&self) -> Option<Media> {
        heaviest(&[(self.event_stream, Media::EventStream), (self.multipart, Media::Multipart)])
    }

    /// The form for a refusal, which always has one.
    pub fn refusal(&self) -> Media {
        let forms = [(self.json, Media::Json), (self.graphql_response, Media::GraphqlResponse)];
        heaviest(&forms).unwrap_or(Media::Json)
    }
}

/// Of equal weights the last one.
fn heaviest(forms: &[(u16, Media)]) -> Option<Media> {
    forms.iter().filter(|(weight, _)| *weight > 0).max_by_key(|(weight, _)| *weight).map(|(_, media)| *media)
}

/// Commas inside quotes do not part ranges; none of the forms we know has any.
fn ranges(header: &str) -> impl Iterator<Item = &str> {
    header.split(',').map(str::trim).filter(|range| !range.is_empty())
}

fn thousandths(text: &str) -> u16 {
    let weight: f32 = text.parse().unwrap_or(0.0);
    (weight.clamp(0.0, 1.0) * 1000.0) as u16
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn accept(text: &'static str) -> Accept {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(text));
        Accept::of(&headers)
    }

    #[test]
    fn the_form_of_a_single_result_follows_weights_and_prefers_the_exact_type() {
        assert_eq!(Accept::of(&HeaderMap::new()).single(), Some(Media::Json));
        for (text, media) in [
            ("*/*", Some(Media::Json)),
            ("application/*", Some(Media::Json)),
            ("application/json", Some(Media::Json)),
            ("application/json; charset=utf-8", Some(Media::Json)),
            ("application/graphql-response+json", Some(Media::GraphqlResponse)),
            ("application/json, application/graphql-response+json", Some(Media::GraphqlResponse)),
            ("application/json, application/graphql-response+json;q=0.9", Some(Media::Json)),
            ("application/graphql-response+json, application/json;q=0", Some(Media::GraphqlResponse)),
            ("application/json, text/event-stream, multipart/mixed", Some(Media::Json)),
            ("text/event-stream", Some(Media::EventStream)),
            ("text/html", None),
            ("application/json;q=0", None),
            ("application/json; charset=latin1", None),
        ] {
            assert_eq!(accept(text).single(), media, "{text}");
        }
    }

    #[test]
    fn a_stream_needs_a_form_that_streams() {
        for (text, media) in [
            ("application/json", None),
            ("*/*", None),
            ("multipart/mixed", None),
            (
                "multipart/mixed;boundary=\"graphql\";subscriptionSpec=\"1.0\",application/json",
                Some(Media::Multipart),
            ),
            ("multipart/mixed;subscriptionSpec=1.0", Some(Media::Multipart)),
            ("application/json, text/event-stream, multipart/mixed", Some(Media::EventStream)),
        ] {
            assert_eq!(accept(text).stream(), media, "{text}");
        }
    }
}
