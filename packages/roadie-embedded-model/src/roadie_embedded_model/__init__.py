"""The embedded model of roadie, and three adapters of it: files, which `roadie.embedded` finds here."""
