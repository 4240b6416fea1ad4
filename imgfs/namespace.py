"""The flat namespace over the datadirs: finding, creating, placing, renaming and removing images.

It also keeps the table of live images, so that everybody who is concerned with an inode shares one `Image`. Nothing
else is remembered: what a name means is asked of the datadirs each time.

Threading: all methods may be called from any thread. `_table_lock` guards the table and is never held over I/O;
`_placing` makes choosing a datadir and reserving room in it one step; names that change are locked one by one. Order:
names, then an image's change lock, then `_placing`, then `_table_lock`.
"""

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imgfs import names, placement
from imgfs.copies import Copies, copies_of, described
from imgfs.datadir import FULL_ERRNOS, Datadir, Entry, Replaced, answers
from imgfs.errors import ImageExists, ImageNotFound, ImgfsError, NameDoubled, ReservedName, StorageFull
from imgfs.image import Image, Key, StreamFactory, key_of
from imgfs.name_locks import NameLocks, Turn

log = logging.getLogger(__name__)

_PASSED_OVER = FULL_ERRNOS | {errno.EROFS}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a new image belongs to; -1: whomever the datadir gives it to."""

    uid: int = -1
    gid: int = -1


NOBODY_IN_PARTICULAR = Owner()


class Namespace:
    """The images of several datadirs, highest priority first, under one set of names."""

    def __init__(
        self,
        datadirs: Sequence[Datadir],
        new_stream: StreamFactory,
        removed: Callable[[Image], None],
        *,
        thin: bool,
        write_once: bool,
        image_class: type[Image] = Image,
        noted: Callable[[Datadir, str], None] = lambda _datadir, _name: None,
    ) -> None:
        """`removed` is called with each live image that loses its name for good.

        `noted` is called with each name in a datadir that was removed or renamed, or renamed to.
        """
        self._image_class = image_class
        self.datadirs = datadirs
        self._removed = removed
        self._noted = noted
        self._new_stream = new_stream
        self._thin = thin
        self._write_once = write_once
        self._names = NameLocks(self._require_not_stuck)
        self._placing = Turn()
        self._table_lock = threading.Lock()
        self._live: dict[Key, Image] = {}  # guarded by _table_lock
        self._declared: set[Image] = set()  # guarded by _table_lock: live images whose size was declared
        self.copies = Copies(datadirs, self._is_saving, self._names.held)
        for datadir in self.online():
            self.finish_replacements_in(datadir)

    # --- finding ---

    def online(self) -> list[Datadir]:
        """The datadirs that can be asked, highest priority first."""
        return [datadir for datadir in self.datadirs if datadir.offline is None]

    def answers(self, ask: Callable[[Datadir], T]) -> list[T]:
        """What each datadir that is online answers; one that turns out to be lost is passed over."""
        return answers(self.datadirs, ask)

    def replace(self, lost: Collection[int]) -> None:
        """Nobody waits for these threads, which are stuck in a datadir."""
        self._placing.take_from(lost)

    def _require_not_stuck(self, thread: int) -> None:
        """Raise DatadirOffline where a thread is stuck in a datadir."""
        for datadir in self.datadirs:
            if datadir.has_stuck(thread):
                datadir.require_online()

    def listing(self) -> Iterator[tuple[str, int]]:
        """Every image, once: its name and its inode number. Those of a datadir that is offline are left out."""
        seen: set[str] = set()
        doubled: list[str] = []
        for datadir in self.online():
            for entry in _entries(datadir):
                if entry.name in seen:
                    doubled.append(entry.name)
                    continue
                if len(self.datadirs) > 1:
                    seen.add(entry.name)
                if entry.name in self.copies.names and (served := self.find(entry.name)):
                    yield entry.name, served[0].inode_number(served[1].st_ino)
                else:
                    yield entry.name, datadir.inode_number(entry.ino)
        if doubled:
            self.copies.suspect(doubled)

    def status(self, name: str) -> tuple[Datadir, os.stat_result]:
        """The datadir of an image and its lstat(2) there. Raises ImageNotFound, DatadirOffline."""
        self._check_known(name)
        found = self.find(name)
        if found is None:
            raise ImageNotFound(f"no image {name!r}")
        return found

    def find(self, name: str) -> tuple[Datadir, os.stat_result] | None:
        """The same for a name that an image can have; None where there is none."""
        if name in self.copies.names and (found := self.copies.of(name)):
            return found[0].datadir, found[0].status
        for datadir in self.datadirs:
            if datadir.offline is None:
                try:
                    status = datadir.find(name)
                except OSError as error:
                    if not datadir.is_lost(error):
                        raise
                    continue
                if status is not None:
                    return datadir, status
        self._require_not_offline(name)
        return None

    def _require_not_offline(self, name: str) -> None:
        """Raise DatadirOffline for a name that a datadir which can't be asked is known to have."""
        for datadir in self.datadirs:
            if datadir.offline is not None and self._is_known_at(datadir, name):
                datadir.require_online()

    def _is_known_at(self, datadir: Datadir, name: str) -> bool:
        """Whether an offline datadir has an image of that name, as far as is known without asking it."""
        return name in datadir.known_names or any(
            image.name == name and image.datadir is datadir for image in self.live_images()
        )

    @contextlib.contextmanager
    def image(self, name: str) -> Iterator[Image]:
        """The image of a name, for the duration of a block. Raises ImageNotFound."""
        image = self.pin(name)
        try:
            yield image
        finally:
            self.let_go(image)

    def pin(self, name: str) -> Image:
        """The image of a name with one more reference, which `let_go` takes back. Raises ImageNotFound."""
        self._check_known(name)
        for datadir in self._having(name):
            try:
                path_fd = datadir.pin(name)
            except ImageNotFound:
                continue
            except OSError as error:
                if not datadir.is_lost(error):
                    raise
                continue
            image = self._shared(self._image(datadir, name, path_fd, os.fstat(path_fd)))
            self._keep_name(image, name)
            return image
        self._require_not_offline(name)
        raise ImageNotFound(f"no image {name!r}")

    def _having(self, name: str) -> list[Datadir]:
        """The datadirs to be asked for a name, in this order."""
        if name in self.copies.names:
            return [copy.datadir for copy in self.copies.of(name)]
        return self.online()

    def _is_saving(self, status: os.stat_result) -> bool:
        with self._table_lock:
            image = self._live.get(key_of(status))
        return image is not None and image.unsealed and bool(image.writers or image.sealing)

    def _require_single(self, *wanted: str) -> None:
        """Raise NameDoubled or DatadirOffline for names of which there is another copy, that would rise in place."""
        for name in wanted:
            self.copies.require_single(name)
            self._require_not_offline(name)

    def _keep_name(self, image: Image, name: str) -> None:
        """Follow what was done to a live image directly, or while it was in no table yet."""
        if image.name == name and image.status().st_nlink:
            return
        links = image.status().st_nlink
        if links == 0:
            image.name = None
        elif links == 1:
            image.name = name  # it was renamed in the datadir

    def hold(self, image: Image) -> Image:
        """One more reference to an image that is referenced already."""
        with self._table_lock:
            image.references += 1
        return image

    def let_go(self, image: Image) -> None:
        """One reference less; the last one closes the image."""
        with self._table_lock:
            image.references -= 1
            if image.references:
                return
            if self._live.get(image.key) is image:
                del self._live[image.key]
            self._declared.discard(image)
        image.close()

    def live_images(self) -> list[Image]:
        """The images that somebody is concerned with at this moment."""
        with self._table_lock:
            return list(self._live.values())

    def _check_known(self, name: str) -> None:
        try:
            names.check(name)
        except ReservedName:
            raise ImageNotFound(f"no image {name!r}") from None

    def _image(self, datadir: Datadir, name: str, path_fd: int, status: os.stat_result) -> Image:
        return self._image_class(
            datadir, name, path_fd, status, self._new_stream, thin=self._thin, write_once=self._write_once
        )

    def _shared(self, fresh: Image) -> Image:
        """The live image of the inode of `fresh`: `fresh` itself where there is none yet."""
        with self._table_lock:
            live = self._live.setdefault(fresh.key, fresh)
            live.references += 1
        if live is not fresh:
            fresh.close()
        return live

    # --- creating and placing ---

    def create(self, name: str, mode: int, owner: Owner = NOBODY_IN_PARTICULAR) -> Image:
        """A new, empty image on the best datadir, referenced once and ready to be written.

        Raises ImageExists where the name is taken in whichever datadir, StorageFull where no datadir has room,
        DatadirOffline where one that can't be asked is known to have the name.
        """
        names.check(name)
        with self._names.held(name):
            placed = self._placed(None)
            # The first one placed says itself whether it has the name (O_EXCL), before anything else.
            if self._is_taken(name, but=placed[:1]):
                raise ImageExists(f"image {name!r} exists")
            self._require_not_offline(name)
            datadir, fd, status = self._create_in(placed, name, mode, owner)
            return self._adopted(self._image(datadir, name, fd, status))

    def _is_taken(self, name: str, but: Container[Datadir]) -> bool:
        """Whether anything has a name in some datadir other than those given, as far as can be asked."""
        for datadir in self.datadirs:
            if datadir.offline is None and datadir not in but:
                try:
                    if datadir.has_any(name):
                        return True
                except OSError as error:
                    if not datadir.is_lost(error):
                        raise
        return False

    def _adopted(self, fresh: Image) -> Image:
        """Enter an image that was just created; somebody may have looked it up already, and entered it before."""
        fresh.adopt(fresh.path_fd)
        with self._table_lock:
            live = self._live.setdefault(fresh.key, fresh)
            live.references += 1
        if live is not fresh:
            with live.change_lock:
                if not live.unsealed:
                    live.adopt(os.dup(fresh.path_fd))
            fresh.close()
        return live

    def declare_size(self, image: Image, size: int, strict: bool) -> None:
        """Reserve `size` bytes for an image that is being written; place it anew while it is still empty.

        Where no datadir can take it: StorageFull if `strict`, otherwise nothing is reserved (a sparse file may be
        larger than the disk).
        """
        with self._named(image), image.change_lock, self._placing:
            image.declared_bytes = 0
            status = image.status()
            empty = image.name is not None and status.st_size == 0 and not image.pinned
            missing = max(0, size - status.st_blocks * 512)
            fitting = [datadir for datadir in self._placed(missing) if empty or datadir is image.datadir]
            if not fitting and strict:
                raise StorageFull(f"no datadir has room for the {size} bytes declared for {image.name!r}")
            if not fitting:
                return
            if not self._well_placed(image, fitting, strict):
                return
            image.declared_bytes = size
            with self._table_lock:
                self._declared.add(image)

    def _well_placed(self, image: Image, fitting: list[Datadir], strict: bool) -> bool:
        """Move the image to a better datadir, if one takes it; False where it can stay nowhere, and need not."""
        here = image.datadir in fitting
        if here and image.datadir.priority == fitting[0].priority:
            return True
        better = [datadir for datadir in fitting if not here or datadir.priority > image.datadir.priority]
        try:
            self._place_anew(image, better)
        except (StorageFull, ImageExists):
            if strict and not here:
                raise
            return here
        return True

    def reserved_bytes(self, datadir: Datadir) -> int:
        """What is promised to images that are being written on a datadir's filesystem and not allocated yet."""
        if not self._declared:
            return 0
        with self._table_lock:
            declared = list(self._declared)
            for image in declared:
                image.references += 1
        reserved = sum(
            image.outstanding_bytes()
            for image in declared
            if image.datadir.device == datadir.device and image.datadir.offline is None
        )
        for image in declared:
            self.let_go(image)
        return reserved

    def _placed(self, size: int | None) -> list[Datadir]:
        candidates = (self._candidate(datadir) for datadir in self.datadirs if datadir.takes_images)
        return placement.order([candidate for candidate in candidates if candidate is not None], size)

    def _candidate(self, datadir: Datadir) -> placement.Candidate[Datadir] | None:
        """None for one that turns out to be lost."""
        kept = self.reserved_bytes(datadir) + datadir.config.min_free_bytes
        try:
            return placement.Candidate(datadir, datadir.priority, datadir.free_bytes() - kept)
        except OSError as error:
            if not datadir.is_lost(error):
                raise
            return None

    def _create_in(
        self, datadirs: Iterable[Datadir], name: str, mode: int, owner: Owner
    ) -> tuple[Datadir, int, os.stat_result]:
        """A new file in the first datadir that takes it, and its fstat(2) as it was created."""
        for datadir in datadirs:
            try:
                return datadir, *datadir.obtain(
                    lambda made, datadir=datadir: _unmake_file(datadir, name, made[0]),  # type: ignore[misc]
                    _create_file, datadir, name, mode, owner,
                )  # fmt: skip
            except FileExistsError:
                raise ImageExists(f"image {name!r} exists") from None
            except OSError as error:
                if error.errno not in _PASSED_OVER and not datadir.is_lost(error):
                    raise
                log.warning("datadir %s is passed over for %r: %s", datadir.path, name, error.strerror)
        raise StorageFull(f"no datadir has room for {name!r}")

    def _place_anew(self, image: Image, fitting: list[Datadir]) -> None:
        """Move an image that has no bytes yet; its handles continue in the new file."""
        assert image.name is not None
        before, old = image.status(), image.datadir
        mode, owner = stat.S_IMODE(before.st_mode), Owner(before.st_uid, before.st_gid)
        datadir, fd, _ = self._create_in(fitting, image.name, mode, owner)
        try:
            for attribute in old.xattrs.list(image.path_fd):
                if attribute.startswith("user."):
                    datadir.xattrs.set(fd, attribute, old.xattrs.get(image.path_fd, attribute))
        except BaseException:
            os.close(fd)
            datadir.unlink(image.name)
            raise
        old.xattrs.forget(before.st_ino)
        with self._table_lock:
            del self._live[image.key]
            image.move_to(datadir, fd)
            self._live[image.key] = image
        old.unlink(image.name)

    @contextlib.contextmanager
    def _named(self, image: Image) -> Iterator[None]:
        """Hold the lock of the name that an image has, whatever it is by then."""
        while True:
            name = image.name
            with self._names.held(*([name] if name is not None else [])):
                if image.name == name:
                    yield
                    return

    # --- removing and renaming ---

    def delete(self, name: str) -> None:
        """Remove an image; handles that are open keep it readable. Raises ImageNotFound, or the true errno."""
        with self._names.held(name):
            self._require_single(name)
            datadir, status = self.status(name)
            datadir.require_writable()
            datadir.unlink(name)
            self._noted(datadir, name)
            if status.st_nlink == 1:
                datadir.xattrs.forget(status.st_ino)
            with self._table_lock:
                image = self._live.get(key_of(status))
            if image is not None and image.name == name:
                image.name = None
                self._removed(image)

    def discard(self, image: Image) -> None:
        """Remove an image at hand, whatever its name is now; one without a name is gone already."""
        with self._named(image):
            if image.name is not None and self._is_at(image, image.name):
                self._unlink(image, image.name)

    def _is_at(self, image: Image, name: str) -> bool:
        """Whether a name leads to an image at hand; in the datadir, somebody may have put another file there."""
        status = image.datadir.find(name)
        return status is not None and key_of(status) == image.key

    def rename(self, old: str, new: str, may_replace: Callable[[Image], None]) -> None:
        """Rename an image; one that has the new name already is replaced, in whatever datadir it lies.

        The image stays in its datadir, with its record. After a crash at any point the store shows the state
        before or the state after. `may_replace` is asked about an image that would go, and raises where it may
        not. Raises ImageNotFound, ImageExists where something that is no image has the name.
        """
        names.check(new)
        with self._names.held(old, new), self.image(old) as image:
            image.datadir.require_writable()
            if old == new:
                return
            self._require_single(old, new)
            with contextlib.ExitStack() as stack:
                target = None
                with contextlib.suppress(ImageNotFound):
                    target = stack.enter_context(self.image(new))
                if target is image:
                    return  # two names of one inode: rename(2) does nothing
                if target is not None:
                    may_replace(target)
                self._rename(image, old, new, target)

    def exchange(self, one: str, other: str) -> None:
        """Swap the names of two images of one datadir, in one step; they stay what they are.

        Raises ImageNotFound, and EXDEV for images in different datadirs: that would take two steps.
        """
        names.check(one)
        names.check(other)
        with self._names.held(one, other), self.image(one) as first, self.image(other) as second:
            self._require_single(one, other)
            first.datadir.require_writable()
            if first.datadir is not second.datadir:
                raise ImgfsError("images in different datadirs can't be exchanged in one step", errno.EXDEV)
            first.datadir.exchange(one, other)
            first.name, second.name = other, one
            self._noted(first.datadir, one)
            self._noted(first.datadir, other)

    def _rename(self, image: Image, old: str, new: str, target: Image | None) -> None:
        here = target is not None and target.datadir is image.datadir
        if self._is_taken(new, but=[target.datadir] if target else []):
            self._refuse_taken(new)
        if target is not None:
            # What replaces an image must be on stable storage before that is gone.
            image.sync()
        if target is not None and not here:
            self._replace_elsewhere(image, old, new, target)
        else:
            image.datadir.rename(old, new)
            if target is not None:
                self._forget(target, new)
        image.name = new
        self._noted(image.datadir, old)
        self._noted(image.datadir, new)

    def _refuse_taken(self, name: str) -> None:
        """A second copy, not known until now, or something that is no image."""
        found = copies_of(name, self.datadirs)
        if len(found) > 1:
            self.copies.suspect([name])
            raise NameDoubled(f"{name!r} lies in more than one datadir: {described(found)}; remove one there first")
        raise ImageExists(f"{name!r} is taken in a datadir by something that is no image; remove that first")

    def _replace_elsewhere(self, image: Image, old: str, new: str, target: Image) -> None:
        """Two directories can't change in one step: a note on stable storage says which copy gives way."""
        note = target.datadir.note_replaced(new, image.datadir)
        try:
            image.datadir.rename(old, new)
        except BaseException:
            target.datadir.forget_replaced(note)
            raise
        image.datadir.sync()
        self._unlink(target, new)
        target.datadir.sync()
        target.datadir.forget_replaced(note)

    def _unlink(self, image: Image, name: str) -> None:
        image.datadir.unlink(name)
        self._noted(image.datadir, name)
        self._forget(image, name)

    def _forget(self, image: Image, name: str) -> None:
        if image.name == name:
            image.name = None
        status = image.status()
        if status.st_nlink == 0:
            image.datadir.xattrs.forget(status.st_ino)
        self._removed(image)

    def finish_replacements_in(self, datadir: Datadir) -> None:
        """Complete the replacements that a crash cut short: the old copy goes if another has its name."""
        for note in datadir.notes_of_replaced():
            if any(d.path == note.by and d.offline is not None for d in self.datadirs):
                continue  # whether the rename happened is not known
            with self._names.held(note.name):
                if datadir.has_note(note):  # not of a rename that was just under way
                    self._finish_replacement(datadir, note)

    def _finish_replacement(self, datadir: Datadir, note: Replaced) -> None:
        with contextlib.suppress(ImageNotFound):
            renamed = note.name and any(d.has_any(note.name) for d in self.datadirs if d.path == note.by)
            if renamed and datadir.status(note.name).st_ino == note.ino:
                log.warning("the replacement of image %r was cut short; it is completed", note.name)
                datadir.unlink(note.name)
        datadir.forget_replaced(note)


def _entries(datadir: Datadir) -> Iterator[Entry]:
    """The images of a datadir, none more once it turns out to be lost."""
    try:
        yield from datadir.entries()
    except OSError as error:
        if not datadir.is_lost(error):
            raise


def _create_file(datadir: Datadir, name: str, mode: int, owner: Owner) -> tuple[int, os.stat_result]:
    """A new file with exactly this mode, and this owner where the process may give files away."""
    given_away = owner.uid not in (-1, os.geteuid()) or owner.gid not in (-1, os.getegid())
    # Until it has its owner, nobody else may open it.
    fd = datadir.create(name, 0o600 if given_away else mode)
    try:
        status = os.fstat(fd)
        datadir.xattrs.forget(status.st_ino)  # of an earlier inode of this number
        if owner.uid not in (-1, status.st_uid) or owner.gid not in (-1, status.st_gid):
            try:
                os.fchown(fd, owner.uid, owner.gid)
            except PermissionError:
                log.debug("image %r can't be given to %s; it stays with the daemon", name, owner)
                mode &= ~(stat.S_ISUID | stat.S_ISGID)  # they would act for the daemon
        if given_away or mode != stat.S_IMODE(status.st_mode):
            os.fchmod(fd, mode)
    except BaseException:
        _unmake_file(datadir, name, fd)
        raise
    return fd, status


def _unmake_file(datadir: Datadir, name: str, fd: int) -> None:
    os.close(fd)
    datadir.unlink(name)
