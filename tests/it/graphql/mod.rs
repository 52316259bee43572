//! The GraphQL door through its wires: what each transport promises, and what comes out of every field.

mod documents;
mod http;
mod mutations;
mod queries;
mod rate_limits;
mod readers;
mod strangers;
mod subscriptions;
mod websocket;
