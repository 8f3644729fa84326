"""What test_security.py attacks with: accounts, hostile archives, a pickle that runs a command, raw requests."""

import io
import os
import socket
import tarfile
import zipfile

import bcrypt

PASSWORDS = {"ada": "correct horse", "vera": "battery staple", "rob": "root of all"}


def users_file(folder):
    file = folder / "users"
    roles = {"ada": "", "vera": ":viewer", "rob": ":admin"}
    hashes = {name: bcrypt.hashpw(word.encode(), bcrypt.gensalt(4)).decode() for name, word in PASSWORDS.items()}
    file.write_text("".join(f"{name}:{hashes[name]}{roles[name]}\n" for name in hashes))
    file.chmod(0o600)
    return file


def tar_with(name, kind=tarfile.REGTYPE, target=""):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        member.size = 4 if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(b"evil"))
    return file.getvalue()


def zip_with(name, mode=0o100644):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        archive.writestr(member, b"evil")
    return file.getvalue()


def bomb():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.nii", bytes(9 << 20))
    return file.getvalue()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/evil",))


def raw(server, text):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(text.encode("latin-1"))
        return connection.makefile("rb").readline().decode()
