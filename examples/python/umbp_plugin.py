"""What every plugin of UMBP in Python needs: the process, its calls, its transfers, and the host's memory.

A plugin hands a Backend to main(). The classes below mirror package plugin-sdk/backend, whose documentation is the
contract; docs/plugin-protocol.md describes what happens here on the wire. Transfers come by the plain data path, and
the bytes of a region are asked for by messages: this needs nothing but gRPC.

Calls of a backend run on threads of their own, at the same time. What a backend raises as an Error reaches the host
with its code; any other exception is a defect, and reaches it as Internal.
"""

import json
import os
import queue
import socket
import sys
import tempfile
import threading
import traceback
from concurrent import futures

import grpc

try:
    import backend_pb2 as pb
except ImportError:
    sys.exit("backend_pb2 is missing; make it of plugin-sdk/proto/backendpb/backend.proto: "
             "protoc -I plugin-sdk/proto/backendpb --python_out=examples/python backend.proto")

# Numbers of package backend.
INTERNAL, BUSY, PEER_GONE, PATH_DOWN, BAD_REQUEST, DENIED, INTEGRITY, CANCELLED, UNSUPPORTED = range(1, 10)
NOT_SENT, DONE, FAILED, IN_DOUBT = range(4)
WRITE, READ = 1, 2
REMOTE_READ, REMOTE_WRITE = 1, 2
HOST_MEMORY, GPU_MEMORY = 1, 2
SAME_PROCESS, SAME_HOST, NETWORK = 1, 2, 3

PROTOCOL_VERSION = 1
MESSAGE_BYTES = 1 << 20  # the most that one memory message carries
MESSAGES_IN_FLIGHT = 16  # memory messages without an answer; the host takes no more
GRACE = 10  # seconds for closing


class Error(Exception):
    """An error with one of the codes above."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code, self.text = code, text


class Region:
    """A region of the host. Its bytes are there until the backend's deregister has returned."""

    def __init__(self, memory, request):
        self.id, self.kind, self.rights, self.size = request.region, request.kind, request.rights, request.size
        self._memory = memory

    def load(self, spans):
        """Returns the bytes of each (offset, length); none is longer than MESSAGE_BYTES."""
        requests = [pb.MemoryRequest(region=self.id, offset=o, length=n) for o, n in spans]
        return [reply.data for reply in self._memory.ask(requests)]

    def store(self, spans, pieces):
        """Stores a piece at each (offset, length). When it returns or raises, nothing of it is on its way any more."""
        self._memory.ask([pb.MemoryRequest(region=self.id, offset=o, length=n, store=True, data=d)
                          for (o, n), d in zip(spans, pieces)])


class Memory:
    """The way to the host's memory: requests out, replies in, matched by number."""

    def __init__(self, send):
        self._send = send
        self._lock = threading.Lock()
        self._last = 0
        self._open = {}
        self._room = threading.Semaphore(MESSAGES_IN_FLIGHT)

    def ask(self, requests):
        """Returns the replies. It waits for all of them, also when one is an error."""
        waiting = []
        for request in requests:
            self._room.acquire()
            answer = futures.Future()
            with self._lock:
                self._last += 1
                request.id = self._last
                self._open[request.id] = answer
            self._send(pb.PluginFrame(memory=request))
            waiting.append(answer)
        replies = [answer.result() for answer in waiting]
        for reply in replies:
            if reply.HasField("error"):
                raise Error(reply.error.code, reply.error.text)
        return replies

    def answered(self, reply):
        with self._lock:
            answer = self._open.pop(reply.id, None)
        if answer is not None:
            self._room.release()
            answer.set_result(reply)


class Transfer:
    """One transfer: op, and (local, remote, length) of each segment. The backend calls complete once."""

    def __init__(self, host, post):
        self._host, self._session, self.cookie, self.op = host, post.session, post.cookie, post.op
        numbers = post.segments
        self.segments = list(zip(numbers[0::3], numbers[1::3], numbers[2::3]))

    def complete(self, error=None, outcomes=()):
        """Answers the transfer: every segment is done, or error says why not, with an outcome for each segment."""
        completion = pb.Completion(session=self._session, cookie=self.cookie)
        if error is not None:
            completion.error.CopyFrom(self._host.error(error))
            completion.outcomes = bytes(outcomes)
        self._host.send(pb.PluginFrame(completion=completion))


class Dial:
    """A handshake, and the endpoint that becomes of it."""

    def __init__(self, handshake):
        self.handshake, self.begun, self.endpoint, self.settled = handshake, False, None, threading.Event()


class Host:
    """The service that the host calls. One method for each call of the protocol; see dispatch."""

    def __init__(self, backend, ended):
        self._backend, self._ended = backend, ended
        self._outgoing, self._events = queue.Queue(), queue.Queue()
        self._memory = Memory(self.send)
        self._lock = threading.Lock()
        self._last = 0
        self._dials, self._endpoints, self._sessions = {}, {}, {}

    def send(self, frame):
        self._outgoing.put(frame)

    def error(self, error):
        if not isinstance(error, Error):
            traceback.print_exception(error)
            error = Error(INTERNAL, repr(error))
        return pb.Error(code=error.code, text=error.text, backend=self._backend.NAME)

    def endpoint_down(self, number):
        """The backend tells, once, that the endpoint that was started with this number has failed."""
        self._events.put(pb.Event(endpoint_down=pb.EndpointDown(endpoint=number)))

    def _next(self):
        with self._lock:
            self._last += 1
            return self._last

    def _take(self, table, key):
        with self._lock:
            return table.pop(key, None)

    # The calls, by the names that they have in the protocol. One that takes something into being looks in the end
    # whether the host has given the call up, and takes it back.

    def Open(self, request, context):
        if (pb.DATA_PATH_STREAM not in request.data_paths
                or pb.MEMORY_ACCESS_MESSAGES not in request.memory_accesses):
            raise Error(UNSUPPORTED, "this plugin needs the stream and memory by messages")
        self._backend.open(self, request.self, dict(request.options))
        return pb.OpenReply(
            info=pb.Info(name=self._backend.NAME, version=self._backend.VERSION,
                         capabilities=pb.Capabilities(**self._backend.CAPABILITIES)),
            data_path=pb.DATA_PATH_STREAM, memory_access=pb.MEMORY_ACCESS_MESSAGES)

    def Ping(self, request, context):
        return pb.PingReply()

    def Register(self, request, context):
        key = self._backend.register(Region(self._memory, request))
        if not context.is_active():
            self._backend.deregister(request.region)
        return pb.RegisterReply(key=key)

    def Deregister(self, request, context):
        self._backend.deregister(request.region)
        return pb.DeregisterReply()

    def Offer(self, request, context):
        dial, number = Dial(self._backend.offer(request.peer)), self._next()
        with self._lock:
            self._dials[number] = dial
        if not context.is_active():
            self._abandon(number)
        return pb.OfferReply(handshake=number, offer=dial.handshake.offer)

    def Establish(self, request, context):
        with self._lock:
            dial = self._dials.get(request.handshake)
            if dial is None or dial.begun:
                raise Error(BAD_REQUEST, "there is no such handshake")
            dial.begun = True
        try:
            endpoint, number = dial.handshake.establish(request.answer, request.timeout_ns / 1e9), self._next()
            endpoint.start(number)
            dial.endpoint = number
            with self._lock:
                self._endpoints[number] = endpoint
        except BaseException:
            self._take(self._dials, request.handshake)
            raise
        finally:
            dial.settled.set()
        if not context.is_active():
            self._abandon(request.handshake)
        return pb.EstablishReply(endpoint=number)

    def Abandon(self, request, context):
        self._abandon(request.handshake)
        return pb.AbandonReply()

    def _abandon(self, number):
        """Gives up a handshake, or the endpoint that it has become in the meantime."""
        dial = self._take(self._dials, number)
        if dial is None:
            return
        if not dial.begun:
            dial.handshake.abandon()
            return
        dial.settled.wait()
        self._close_endpoint(dial.endpoint)

    def Answer(self, request, context):
        return pb.AnswerReply(answer=self._backend.answer(request.peer, request.offer))

    def Fence(self, request, context):
        self._backend.fence(request.peer)
        return pb.FenceReply()

    def CloseEndpoint(self, request, context):
        self._close_endpoint(request.endpoint)
        return pb.CloseEndpointReply()

    def _close_endpoint(self, number):
        endpoint = self._take(self._endpoints, number)
        if endpoint is None:
            return
        endpoint.close()
        with self._lock:
            self._dials = {n: d for n, d in self._dials.items() if d.endpoint != number}
            self._sessions = {n: s for n, s in self._sessions.items() if s.endpoint is not endpoint}

    def OpenSession(self, request, context):
        with self._lock:
            endpoint = self._endpoints.get(request.endpoint)
        if endpoint is None:
            raise Error(PATH_DOWN, "the endpoint is closed")
        session = endpoint.session(request.local, request.remote)
        with self._lock:
            self._sessions[request.session] = session
        if not context.is_active():
            self._close_session(request.session)
        return pb.OpenSessionReply()

    def CloseSession(self, request, context):
        self._close_session(request.session)
        return pb.CloseSessionReply()

    def _close_session(self, number):
        session = self._take(self._sessions, number)
        if session is not None:
            session.close()

    def Close(self, request, context):
        # The stream goes on until the host ends it: a post may come after this call, and is answered, too.
        timer = threading.Timer(GRACE, self._end)
        timer.daemon = True
        timer.start()
        self._backend.close()
        return pb.CloseReply()

    def _end(self):
        self._events.put(None)
        self._outgoing.put(None)
        self._ended.set()

    # The streams.

    def Events(self, request, context):
        yield from iter(self._events.get, None)

    def Transfers(self, frames, context):
        threading.Thread(target=self._receive, args=(frames,), daemon=True).start()
        yield from iter(self._outgoing.get, None)

    def _receive(self, frames):
        """Takes what comes. Nothing in here waits: replies of memory come by the same way."""
        try:
            for frame in frames:
                self._received(frame)
        except grpc.RpcError:
            pass  # the host is gone
        self._end()

    def _received(self, frame):
        kind = frame.WhichOneof("frame")
        if kind == "memory":
            self._memory.answered(frame.memory)
        elif kind == "post":
            transfer = Transfer(self, frame.post)
            try:
                self._session(frame.post.session).post(transfer)
            except Exception as e:  # refused: nothing has been sent
                transfer.complete(e, [NOT_SENT] * len(transfer.segments))
        elif kind == "cancel":
            try:
                self._session(frame.cancel.session).cancel(frame.cancel.cookie)
            except Error:
                pass  # it has been closed in the meantime

    def _session(self, number):
        with self._lock:
            if number not in self._sessions:
                raise Error(CANCELLED, "the session is closed")  # a post may come after the call
            return self._sessions[number]


def dispatch(host):
    """Returns the handlers of the calls. An error goes into the reply."""

    def unary(call, reply):
        def handle(request, context):
            try:
                return call(request, context)
            except Exception as e:
                return reply(error=host.error(e))
        return handle

    handlers = {}
    for method in pb.DESCRIPTOR.services_by_name["Backend"].methods:
        call, request, reply = getattr(host, method.name, None), *(
            getattr(pb, t.name) for t in (method.input_type, method.output_type))
        codec = {"request_deserializer": request.FromString, "response_serializer": reply.SerializeToString}
        if method.name == "Transfers":
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(call, **codec)
        elif method.name == "Events":
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(call, **codec)
        elif call is not None:  # what is not here, gRPC answers with UNIMPLEMENTED
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(unary(call, reply), **codec)
    return grpc.method_handlers_generic_handler("umbp.backend.v1.Backend", handlers)


def health():
    """Returns the handler of grpc.health.v1.Health/Check, by which the host sees that the plugin serves."""
    check = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01")  # status: SERVING
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})


def watch_parent():
    """Ends the process when the host does. The descriptor is one end of a socket pair, and the host has the other."""
    fd = os.environ.get("UMBP_PLUGIN_PASSAGE_FD")
    if fd is None:
        return
    passage = socket.socket(fileno=int(fd))

    def watch():
        while passage.recv(16):
            pass
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def describe(backend):
    """Returns what is known of a backend that is not open."""
    c = backend.CAPABILITIES

    def words(bits, names):
        return [name for bit, name in names.items() if bits & bit]

    kinds = {1 << HOST_MEMORY: "host", 1 << GPU_MEMORY: "gpu"}
    return {
        "name": backend.NAME, "version": backend.VERSION, "protocol_versions": [PROTOCOL_VERSION],
        "capabilities": {
            "ops": words(c["ops"], {WRITE: "write", READ: "read"}), "local": words(c["local"], kinds),
            "remote": words(c["remote"], kinds), "window": c["window"],
            "reach": {SAME_PROCESS: "same process", SAME_HOST: "same host", NETWORK: "network"}[c["reach"]],
            **{name: c.get(name, 0) for name in ("limit_segments", "limit_segment_bytes", "limit_transfer_bytes")},
            **{name: c.get(name, False) for name in ("needs_fd", "simulated")},
        },
        "options": backend.OPTIONS,
    }


def main(backend):
    """Serves the backend until the host closes it. This is all of a plugin's main program."""
    if sys.argv[1:] == ["describe"]:
        print(json.dumps(describe(backend)))
        return
    if os.environ.get("UMBP_BACKEND_PLUGIN") != "3d1f0c6f-8f7e-4f3c-9a52-1c6c2a5b7d10":
        print(f"This is the backend {backend.NAME} of UMBP, and umbp starts it: name it in the configuration. "
              "The argument describe prints what it can do.", file=sys.stderr)
        sys.exit(2)
    watch_parent()
    ended = threading.Event()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=64))
    server.add_generic_rpc_handlers((dispatch(Host(backend, ended)), health()))
    directory = os.environ.get("PLUGIN_UNIX_SOCKET_DIR") or tempfile.mkdtemp()
    path = os.path.join(directory, f"plugin-{os.getpid()}")
    server.add_insecure_port("unix:" + path)
    server.start()
    print(f"1|{PROTOCOL_VERSION}|unix|{path}|grpc", flush=True)
    ended.wait()
    server.stop(grace=1).wait()
