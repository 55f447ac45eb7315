"""Sockets for a `SocketAddress`: what its words mean, how to connect to it, and how to listen at it.

Knows neither the daemon nor what is said over a socket.
"""
