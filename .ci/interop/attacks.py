#!/usr/bin/env python3
"""Replays the raw requests of attacks.json against a running server and checks what comes back.

usage: attacks.py PORT SERVER_STDERR

A case is made of parts [text or parts, repeat] in latin-1, so that the large ones need no large file.
Expected: one of the statuses ('4xx', '403', or 'none' for a connection closed without a byte) within
its time, no second answer, the server alive afterwards, no traceback and no control byte in its log.
"""
import concurrent.futures
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PORT, LOG = int(sys.argv[1]), sys.argv[2]


def grow(parts):
    return ''.join((p if isinstance(p, str) else grow(p)) * n for p, n in parts)


def raw_of(case):
    if 'noise' in case:
        return bytes(random.Random(70).getrandbits(8) for _ in range(case['noise']))
    parts = case.get('parts', [])
    if 'parameters' in case:
        query = '&'.join('a%d=1' % i for i in range(case['parameters']))
        parts = [parts[0], [query, 1]] + parts[1:]
    return grow(parts).replace('/wecom', '/weixin').encode('latin-1')


def connect():
    return socket.create_connection(('127.0.0.1', PORT), 5)


def send(sock, raw, how, stop):
    try:
        if how['mode'] == 'trickle':
            for i in range(0, len(raw), how['chunk']):
                if stop.wait(how['interval_s']):
                    return
                sock.sendall(raw[i:i + how['chunk']])
            return
        sock.sendall(raw)
        if how['mode'] == 'rst':
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            sock.close()
        elif how.get('fin'):
            sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass                                    # the server had heard enough


def receive(sock, limit):
    """All that comes until the end; (bytes, whether the server closed)."""
    data, begin = b'', time.monotonic()
    sock.settimeout(0.5)
    while time.monotonic() - begin < limit + 1:
        try:
            more = sock.recv(1 << 16)
        except socket.timeout:
            continue
        except OSError:
            return data, True
        if not more:
            return data, True
        data += more
    return data, False


def alive():
    with connect() as sock:
        sock.sendall(b'GET /alive HTTP/1.1\r\nHost: x\r\n\r\n')
        return sock.recv(64).startswith(b'HTTP/1.1 404')


def judge(case, data, closed):
    statuses = re.findall(rb'HTTP/1\.[01] (\d{3}) ', data)
    first = statuses[0].decode() if statuses else 'none' if not data else 'raw'
    if first not in case['status'] and first[0] + 'xx' not in case['status']:
        yield 'status %s' % first
    if len(statuses) > case['responses_max']:
        yield '%d answers' % len(statuses)
    if not closed:
        yield 'not closed'
    if case.get('no_body') and not data.endswith(b'\r\n\r\n'):
        yield 'a body where none belongs'
    if case.get('must_not_contain', '\0').encode() in data:
        yield 'reflected'


def play(case):
    sock, stop, how = connect(), threading.Event(), case['send']
    sender = threading.Thread(target=send, args=(sock, raw_of(case), how, stop), daemon=True)
    sender.start()
    if how['mode'] == 'rst':
        sender.join(5)
        faults = []
    else:
        faults = list(judge(case, *receive(sock, case['within_s'])))
        stop.set()
    sock.close()
    return faults + ([] if alive() else ['the server is dead'])


def main():
    with open(os.path.join(HERE, 'attacks.json')) as f:
        cases = json.load(f)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        results = list(pool.map(play, cases))
    for case, faults in zip(cases, results):
        if faults:
            print('%s (%s): %s' % (case['name'], case['why'], ', '.join(faults)))
    with open(LOG, 'rb') as f:
        log = f.read()
    dirty = log.count(b'Traceback') + len(re.findall(rb'[\x00-\x08\x0b-\x1f\x7f]', log))
    failed = sum(map(bool, results))
    print('attacks: %d passed, %d failed; tracebacks and control bytes in the log: %d'
          % (len(cases) - failed, failed, dirty))
    return 1 if failed or dirty else 0


if __name__ == '__main__':
    sys.exit(main())
