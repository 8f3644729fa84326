"""The server's web side: who is let in (guard, auth), what can be asked for (routes), and how it replaces MONAI Label's
own endpoints in a plain `monailabel start_server` (install)."""
