"""The NBD protocol, sans-IO: bytes in, values and bytes out, no sockets and no clocks.

`constants` are its numbers and `options` the layouts of the handshake; `handshake` is the server's side,
`client` the client's. `transmission` are the requests and replies that follow, and the rules for them;
`replies` is how a client reads its answers.
"""
