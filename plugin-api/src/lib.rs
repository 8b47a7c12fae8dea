//! How plugins and outside tools will control a Cellblock VM. Nothing is here yet.
