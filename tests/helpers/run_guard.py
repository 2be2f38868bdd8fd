"""`PORT`: uvicorn with a guarded application that does nothing. `PORT WAY`: uploads of 64 MiB to it, until killed."""

from __future__ import annotations

import asyncio
import socket
import sys

SIZE, PART = 64 << 20, 1 << 16


def serve(port: int) -> None:
    import uvicorn

    from loopwise.serve.api.limits import HttpLimits
    from loopwise.serve.vllm.guard import Guard, read_body

    async def app(scope, receive, send):
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(
        Guard(app, [], HttpLimits()), port=port, loop="uvloop", http="httptools", lifespan="off", log_level="warning"
    )
    asyncio.run(uvicorn.Server(config).serve())


def upload(port: int, way: str) -> None:
    """Upload again and again; print each status."""
    chunked = way == "chunked"
    head = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {SIZE}"
    part = b"%x\r\n%s\r\n" % (PART, bytes(PART)) if chunked else bytes(PART)
    print("started", flush=True)
    while True:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
            for _ in range(SIZE // PART):
                connection.sendall(part)
            if chunked:
                connection.sendall(b"0\r\n\r\n")
            print(connection.recv(1000).split()[1].decode(), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(int(sys.argv[1]))
    else:
        upload(int(sys.argv[1]), sys.argv[2])
