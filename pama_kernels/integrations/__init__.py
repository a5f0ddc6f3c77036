"""Thin adapters to trainers, one module each: import the one you need; nothing else imports them."""
