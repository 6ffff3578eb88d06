"""A server of Google Cloud Storage's JSON API on this machine: `gcp-storage-emulator`, completed.

It lacks three things that clients need: the generation of an object in the headers of what is read,
conditions on the generation, and moving an object. A bucket named `forbidden` refuses everything.
"""

import contextlib
import functools
import logging
import socket
from http import HTTPStatus

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET = "bucket"


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def completed(handler):
    """Returns a handler of objects that heeds conditions and names the generation."""

    @functools.wraps(handler)
    def handle(request, response, storage, *arguments):
        query, bucket = request.query, request.params["bucket_name"]
        if bucket == "forbidden":
            response.status = HTTPStatus.FORBIDDEN
            response.json({"error": {"code": 403, "message": "no access"}})
            return
        name = request.params.get("object_id") or query.get("name", [""])[0]
        if not name and isinstance(request.data, dict):  # metadata comes before the content
            name = request.data.get("meta", request.data).get("name", "")
        found = generation(storage, bucket, name) if name else "0"
        if query.get("ifGenerationMatch", [found]) != [found]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        elif query.get("ifGenerationNotMatch") == [found]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            response["x-goog-generation"] = found
            handler(request, response, storage, *arguments)

    return handle


HANDLERS = (objects.insert, objects.get, objects.download, objects.delete, objects.ls)
COMPLETED = {handler: completed(handler) for handler in HANDLERS}
for _, methods in emulator.HANDLERS:
    methods.update({method: COMPLETED.get(handler, handler) for method, handler in methods.items()})


def move(request, response, storage):
    """`objects.moveTo`, as a copy and a deletion."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    objects.delete(request, response, storage)


OBJECT = r"/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)"
MOVE = (rf"^{OBJECT}/moveTo/o/(?P<dest_object_id>.+)$", {emulator.POST: move})
emulator.HANDLERS = (MOVE, *emulator.HANDLERS)


@contextlib.contextmanager
def serving():
    """Serves an empty BUCKET; gives the environment in which all clients use this server."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET):
        yield {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks another API, by gRPC
        }
