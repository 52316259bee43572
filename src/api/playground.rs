//! Serves the playground that `build.rs` bundled into the binary. Knows nothing of what the page does.

use std::io::Read;

use axum::Extension;
use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use flate2::read::GzDecoder;
use http::header::{
    ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE,
    ETAG, IF_NONE_MATCH, LOCATION, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::App;
use super::error::Failure;
use crate::domain::send_budget::Reserved;

/// A file of the bundle, kept compressed.
struct Asset {
    path: &'static str,
    etag: &'static str,
    gzip: &'static [u8],
}

/// Empty when the server was built without npm.
static ASSETS: &[Asset] = include!(concat!(env!("OUT_DIR"), "/playground.rs"));

/// Nothing from elsewhere. The editor writes its styles into the page, hence `unsafe-inline` for those; a socket to
/// our own origin is `'self'` too.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
     img-src 'self' data:; font-src 'self'; connect-src 'self'; worker-src 'self'; base-uri 'none'; \
     frame-ancestors 'none'; form-action 'none'";
/// Whose names carry a hash of what is in them.
const HASHED: &str = "assets/";
const FOREVER: &str = "public, max-age=31536000, immutable";
/// How much of an answer is inflated at a time.
const CHUNK: usize = 64 * 1024;

const MISSING: &str = r#"<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sessiond playground</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:4em auto;padding:0 1em;color-scheme:light dark}</style>
<h1>No playground in this build</h1>
<p>The server was built where npm was missing or failed. Install Node 20.19 or later and run</p>
<pre>cargo xtask playground</pre>
<p>in the checkout, then start the server again. The API is here all the same:
<a href="../openapi.json">REST</a>, and GraphQL at <code>/graphql</code>.</p>
</html>
"#;

/// The page and its files. A relative redirect, so that it holds below any path.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/playground", get(|| async { (StatusCode::PERMANENT_REDIRECT, [(LOCATION, "playground/")]) }))
        .route("/playground/", get(|headers: HeaderMap| async move { file("index.html", &headers) }))
        .route(
            "/playground/{*path}",
            get(|Path(path): Path<String>, headers: HeaderMap| async move { file(&path, &headers) }),
        )
}

fn file(path: &str, request: &HeaderMap) -> Response {
    let answer = match ASSETS.iter().find(|asset| asset.path == path) {
        Some(asset) => asset.answer(request),
        None if ASSETS.is_empty() && path == "index.html" => {
            ([(CONTENT_TYPE, content_type(path)), (CACHE_CONTROL, "no-store")], MISSING).into_response()
        }
        None => return Failure::no_route().into_response(),
    };
    let guards = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ];
    (guards, answer).into_response()
}

impl Asset {
    fn answer(&self, request: &HeaderMap) -> Response {
        let fixed = [
            (CONTENT_TYPE, content_type(self.path)),
            (CACHE_CONTROL, if self.path.starts_with(HASHED) { FOREVER } else { "no-cache" }),
            (ETAG, self.etag),
            (VARY, "Accept-Encoding"),
        ];
        if lists(request, &IF_NONE_MATCH, |known| known == self.etag || known == "*") {
            return (StatusCode::NOT_MODIFIED, fixed).into_response();
        }
        if lists(request, &ACCEPT_ENCODING, takes_gzip) {
            let gzip = [(CONTENT_ENCODING, "gzip")];
            return (fixed, gzip, Extension(Reserved), Bytes::from_static(self.gzip)).into_response();
        }
        (fixed, [(CONTENT_LENGTH, HeaderValue::from(self.inflated_len()))], self.inflated()).into_response()
    }

    /// How long the content is: the last four bytes of a gzip member say it.
    fn inflated_len(&self) -> u32 {
        self.gzip.last_chunk().map_or(0, |tail| u32::from_le_bytes(*tail))
    }

    /// The content for the rare client that takes no gzip, a piece at a time as it reads.
    fn inflated(&self) -> Body {
        let mut decoder = GzDecoder::new(self.gzip);
        let pieces = std::iter::from_fn(move || {
            let mut piece = Vec::with_capacity(CHUNK);
            match decoder.by_ref().take(CHUNK as u64).read_to_end(&mut piece) {
                Ok(0) => None,
                read => Some(read.map(|_| Bytes::from(piece))),
            }
        });
        Body::from_stream(futures_util::stream::iter(pieces))
    }
}

/// Whether `is` holds for one of the comma-separated values of a header.
fn lists(request: &HeaderMap, name: &HeaderName, is: impl Fn(&str) -> bool) -> bool {
    let values = request.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|value| is(value.trim()))
}

/// `gzip`, `*` or either with a weight above zero.
fn takes_gzip(coding: &str) -> bool {
    let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
    let weight = weight.trim().strip_prefix("q=").unwrap_or("1");
    ["gzip", "*"].contains(&name.trim()) && weight.parse().is_ok_and(|weight: f32| weight > 0.0)
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "html" => "text/html; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "json" => "application/json",
        "md" => "text/markdown; charset=utf-8",
        "svg" => "image/svg+xml",
        "ttf" => "font/ttf",
        "woff2" => "font/woff2",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    async fn body(response: Response) -> Vec<u8> {
        axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec()
    }

    /// `printf '<p>hello' | gzip -n`.
    const GZIP: &[u8] = &[
        0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0xb3, 0x29, 0xb0, 0xcb, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0, 0x36,
        0x7e, 0x6a, 0x95, 8, 0, 0, 0,
    ];
    const PAGE: Asset = Asset { path: "index.html", etag: "W/\"1\"", gzip: GZIP };

    #[test]
    fn an_encoding_is_taken_unless_its_weight_is_zero() {
        for (value, taken) in [
            ("gzip", true),
            ("br, gzip;q=0.5", true),
            ("deflate, *", true),
            ("gzip;q=0", false),
            ("identity, br;q=1.0", false),
            ("gzip;q=x", false),
            ("", false),
        ] {
            assert_eq!(
                lists(&headers(ACCEPT_ENCODING, value), &ACCEPT_ENCODING, takes_gzip),
                taken,
                "{value}"
            );
        }
        assert!(!lists(&HeaderMap::new(), &ACCEPT_ENCODING, takes_gzip));
    }

    #[tokio::test]
    async fn a_client_without_gzip_reads_the_same_page() {
        let answer = PAGE.answer(&HeaderMap::new());
        assert_eq!(answer.headers()[CONTENT_LENGTH], "8");
        assert!(!answer.headers().contains_key(CONTENT_ENCODING));
        assert_eq!(body(answer).await, b"<p>hello");
    }

    #[tokio::test]
    async fn a_page_is_sent_compressed_once_and_then_not_again() {
        let answer = PAGE.answer(&headers(ACCEPT_ENCODING, "gzip, br"));
        assert_eq!(answer.headers()[CONTENT_ENCODING], "gzip");
        assert_eq!(answer.headers()[CACHE_CONTROL], "no-cache");
        assert_eq!(body(answer).await, GZIP);
        let answer = PAGE.answer(&headers(IF_NONE_MATCH, "W/\"0\", W/\"1\""));
        assert_eq!(answer.status(), StatusCode::NOT_MODIFIED);
        assert!(body(answer).await.is_empty());
    }

    #[test]
    fn every_answer_carries_the_policy_and_nothing_else_is_found() {
        let page = file("index.html", &HeaderMap::new());
        assert_eq!(page.status(), StatusCode::OK);
        assert_eq!(page.headers()[CONTENT_SECURITY_POLICY], POLICY);
        assert_eq!(page.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
        for path in ["", "index.htm", "../Cargo.toml", "assets/"] {
            assert_eq!(file(path, &HeaderMap::new()).status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn every_bundled_file_has_a_type_that_browsers_know() {
        for asset in ASSETS {
            assert_ne!(content_type(asset.path), "application/octet-stream", "{}", asset.path);
        }
    }
}
