"""Where the ops meet other libraries. Each file needs its library only when it is used."""
