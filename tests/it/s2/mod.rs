//! The S2 wire as direct writers meet it: what it answers, what it refuses, and what it must never lose or double.

mod absent;
mod append;
mod backlog;
mod closing;
mod faults;
mod hostile;
mod initialize;
mod read;
mod sdk;
mod session;
