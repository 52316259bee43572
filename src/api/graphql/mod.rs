//! The GraphQL door: the same use cases as REST, for GraphQL clients.
//!
//! A request passes `transport` (HTTP, WebSocket, SSE or multipart), `engine` (guard, parser, limits), `schema` (the
//! resolvers, which only translate) and back. async-graphql stays inside this module.

mod cost;
mod engine;
mod error;
mod events;
mod guard;
mod inputs;
mod introspection;
mod payload;
mod persisted;
mod reply;
mod schema;
mod selection;
mod transport;
mod unreadable;

pub use engine::Engine;
pub use schema::sdl;
pub(super) use transport::routes;

/// Where the door is.
pub const PATH: &str = "/graphql";
