"""Who may do what, and who did: keys, scopes, rates, and the audit log."""
