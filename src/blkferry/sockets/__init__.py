"""Sockets for a `SocketAddress`: what its words mean, and how to connect to it.

Knows neither the daemon nor what is said over a socket; who listens is `daemon.listener`.
"""
