"""The engine in a FastAPI application: `uvicorn --app-dir examples fastapi_app:app`.

http://127.0.0.1:8000/draw?prompt=red+heart shows an image. Requests that come at the same time share every step of the
model. A full queue, or a request that takes longer than a minute, gets status 503.
"""

import io
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Response

from engine import AsyncEngine, Engine, InputError, Request
from engine.serving.async_engine import DeadlineExceeded, QueueFull


@asynccontextmanager
async def lifespan(app: FastAPI):
    app.state.engine = AsyncEngine(Engine.from_pretrained(), max_queue=64)
    yield
    await app.state.engine.drain(seconds=10)


app = FastAPI(lifespan=lifespan)


@app.get("/draw")
async def draw(prompt: str, seed: int = 0, steps: int = 25) -> Response:
    try:
        result = await app.state.engine.generate(Request(prompt, seed=seed, steps=steps), deadline=60)
    except InputError as error:
        raise HTTPException(422, str(error)) from None
    except (QueueFull, DeadlineExceeded) as error:
        raise HTTPException(503, str(error)) from None
    png = io.BytesIO()
    result.image.save(png, "PNG")
    return Response(png.getvalue(), media_type="image/png")
