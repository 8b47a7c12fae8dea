//! Cellblock's jails.
