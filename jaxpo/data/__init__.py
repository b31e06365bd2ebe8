"""Preference data on the host: source rows -> text -> tokens -> audited pairs -> rows of a batch. numpy only."""
