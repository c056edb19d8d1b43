"""Evaluators of a frozen backbone on labelled shards: kNN, a sweep of linear probes, the published protocols."""
