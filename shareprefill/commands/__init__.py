"""Commands of `sp`, one a file: parse, build a configuration, call one function, print."""
