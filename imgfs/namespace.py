"""The flat namespace over the datadirs: finding, creating, placing, renaming and removing images.

It also keeps the table of live images, so that everybody who is concerned with an inode shares one `Image`. Nothing
else is remembered: what a name means is asked of the datadirs each time.

Threading: all methods may be called from any thread. `_table_lock` guards the table and is never held over I/O;
`_placing` makes choosing a datadir and reserving room in it one step; names that change are locked one by one. Order:
an image's change lock, which may be held for as long as a relocation takes, then names, then `_placing`, then
`_table_lock`. So whoever holds a name never waits for an image's writers.
"""

import contextlib
import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

from imgfs import names, placement
from imgfs.copies import Copies, copies_of, described
from imgfs.datadir import FULL_ERRNOS, LOST_ERRNOS, Datadir, Entry, Replaced
from imgfs.errors import (
    AnsweredTooLate,
    ImageExists,
    ImageNotFound,
    ImgfsError,
    NameDoubled,
    ReservedName,
    StorageFull,
)
from imgfs.image import Image, Key, StreamFactory, key_of
from imgfs.inode import Inode, inode_of
from imgfs.name_locks import NameLocks, Turn
from imgfs.transit import Transit, remove_leftovers

log = logging.getLogger(__name__)

_ATTEMPTS = 10
_PASSED_OVER = FULL_ERRNOS | {errno.EROFS}
T = TypeVar("T")


class Owner(NamedTuple):
    """Whom a new image belongs to; -1: whomever the datadir gives it to.

    `by_default`: the group gives way to that of a set-gid datadir, as for any new file (inode(7)).
    """

    uid: int = -1
    gid: int = -1
    by_default: bool = False


NOBODY_IN_PARTICULAR = Owner()


@dataclass(eq=False, slots=True)
class Promise:
    """Room for `size` bytes on a datadir, for an image on its way there that has `used` so many of them."""

    datadir: Datadir
    size: int
    used: int = 0

    def outstanding_bytes(self) -> int:
        """What is not yet allocated."""
        return max(0, self.size - self.used)


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
        self._tiers = placement.tiers(datadirs)
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
        self._promises: set[Promise] = set()  # guarded by _table_lock
        self._moves = 0  # how many images went to another datadir; who saw none of the two files looks again
        self.copies = Copies(datadirs, self._is_saving, self._names.held)
        self.finish_replacements()
        for datadir in self.online():
            remove_leftovers(datadir)

    # --- finding ---

    def online(self) -> list[Datadir]:
        """The datadirs that can be asked, highest priority first."""
        return [datadir for datadir in self.datadirs if datadir.offline is None]

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
        before = moves = -1
        while moves != self._moves:
            before, moves = moves, self._moves
            for datadir in self.online():
                for entry in _entries(datadir):
                    if entry.name in seen:
                        if before == -1:
                            doubled.append(entry.name)
                        continue
                    if len(self.datadirs) > 1:
                        seen.add(entry.name)
                    yield entry.name, self._shown_number(datadir, entry)
        if doubled:
            self.copies.suspect(doubled)

    def _shown_number(self, datadir: Datadir, entry: Entry) -> int:
        """The inode number of the file that is served under a name."""
        if entry.name in self.copies.names and (served := self.find(entry.name)):
            return served[0].inode_number(served[1].st_ino)
        return datadir.inode_number(entry.ino)

    def status(self, name: str) -> tuple[Datadir, os.stat_result]:
        """The datadir of an image and its lstat(2) there. Raises ImageNotFound, DatadirOffline."""
        found = self.find(name)
        if found is None:
            raise ImageNotFound(f"no image {name!r}")
        return found

    def find(self, name: str) -> tuple[Datadir, os.stat_result] | None:
        """The same; None where there is none. Raises InvalidName for what is no name."""
        if not _may_exist(name):
            return None
        if name in self.copies.names and (found := self.copies.of(name)):
            return found[0].datadir, found[0].status
        moves = -1
        while moves != self._moves:
            moves = self._moves
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

    @contextlib.contextmanager
    def held(self, image: Image) -> Iterator[Image]:
        """An image at hand, which nobody closes inside the block. Raises OSError, EBADF, where somebody has."""
        self.hold(image)
        try:
            yield image
        finally:
            self.let_go(image)

    def pin(self, name: str) -> Image:
        """The image of a name with one more reference, which `let_go` takes back. Raises ImageNotFound."""
        if not _may_exist(name):
            raise ImageNotFound(f"no image {name!r}")
        for _ in range(_ATTEMPTS):
            moves, image = self._moves, self._pinned(name)
            if image is not None:
                return image
            if moves == self._moves:
                break
        self._require_not_offline(name)
        raise ImageNotFound(f"no image {name!r}")

    def _pinned(self, name: str) -> Image | None:
        for datadir in self._having(name):
            try:
                image = self._pinned_in(datadir, name)
            except ImageNotFound:
                continue
            except OSError as error:
                if not datadir.is_lost(error):
                    raise
                continue
            return image
        return None

    def _pinned_in(self, datadir: Datadir, name: str) -> Image:
        """Raises ImageNotFound. A file that is replaced directly goes from under the lookup, which looks again."""
        for _ in range(_ATTEMPTS):
            path_fd = datadir.pin(name)
            image = self._shared(self._image(datadir, name, path_fd, os.fstat(path_fd)))
            if self._keep_name(image, name):
                return image
            self.let_go(image)
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

    def _keep_name(self, image: Image, name: str) -> bool:
        """Follow what was done to a live image directly, or while it was in no table yet.

        False where it was removed, or moved away.
        """
        links = image.status().st_nlink
        if links == 0:
            image.name = None
        elif links == 1 and image.name != name:
            image.name = name  # it was renamed in the datadir
        return links > 0

    def hold(self, image: Image) -> Image:
        """One more reference to an image. Raises OSError, EBADF, where the last one has gone."""
        with self._table_lock:
            if not image.references:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
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
            best = next(placed, None)
            # The first one placed says itself whether it has the name (O_EXCL), before anything else.
            if self._is_taken(name, but=(best,)):
                raise ImageExists(f"image {name!r} exists")
            self._require_not_offline(name)
            datadir, fd, status = self._create_in(chain((best,) if best else (), placed), name, mode, owner)
            fresh = self._image(datadir, name, fd, status)
            fresh.adopt(fd)
            with self._table_lock:
                live = self._live.setdefault(fresh.key, fresh)
                live.references += 1
        if live is not fresh:
            self._hand_over(fresh, live)
        return live

    def _is_taken(self, name: str, but: Container[Datadir | None] = ()) -> bool:
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

    def _hand_over(self, fresh: Image, live: Image) -> None:
        """Somebody has looked up an image that was just created, and entered it in the table before."""
        with live.change_lock:
            if not live.unsealed:
                live.adopt(os.dup(fresh.path_fd))
        fresh.close()

    def reserve(self, image: Image, size: int) -> list[Datadir]:
        """Reserve `size` bytes for an image where it is, if there is room; gives the datadirs that have it.

        Called under the image's change lock, as `declare` and `replace_file` are.
        """
        with self._placing:
            image.declared_bytes = 0
            fitting = list(self._placed(max(0, size - image.status().st_blocks * 512)))
            if image.datadir in fitting:
                self.declare(image, size)
        return fitting

    def declare(self, image: Image, size: int) -> None:
        """Count what an image has not yet allocated of `size` bytes as used, until its last writer is gone."""
        image.declared_bytes = size
        with self._table_lock:
            self._declared.add(image)

    @contextlib.contextmanager
    def promised(self, size: int, passed_over: Collection[Datadir]) -> Iterator[Promise]:
        """Inside, `size` bytes are promised on the best datadir that has them, but those passed over.

        Raises StorageFull where none has.
        """
        with self._placing:
            fitting = [datadir for datadir in self._placed(size) if datadir not in passed_over]
            if not fitting:
                raise StorageFull(f"no other datadir has room for {size} bytes")
            promise = Promise(fitting[0], size)
            with self._table_lock:
                self._promises.add(promise)
        try:
            yield promise
        finally:
            with self._table_lock:
                self._promises.discard(promise)

    def reserved_bytes(self, datadir: Datadir) -> int:
        """What is promised to images that are being written on a datadir's filesystem and not allocated yet."""
        if not self._declared and not self._promises:
            return 0
        with self._table_lock:
            declared = list(self._declared)
            for image in declared:
                image.references += 1
            promised: list[Image | Promise] = [*declared, *self._promises]
        try:
            return sum(
                one.outstanding_bytes()
                for one in promised
                if one.datadir.device == datadir.device and one.datadir.offline is None
            )
        finally:
            for image in declared:
                self.let_go(image)

    def _placed(self, size: int | None) -> Iterator[Datadir]:
        return placement.order(map(self._candidates, self._tiers), size)

    def _candidates(self, tier: Iterable[Datadir]) -> Iterator[placement.Candidate[Datadir]]:
        for datadir in tier:
            if datadir.takes_images and (candidate := self._candidate(datadir)) is not None:
                yield candidate

    def _candidate(self, datadir: Datadir) -> placement.Candidate[Datadir] | None:
        """None for one that turns out to be lost."""
        kept = self.reserved_bytes(datadir) + datadir.config.min_free_bytes
        try:
            return placement.Candidate(datadir, datadir.free_bytes() - kept)
        except OSError as error:
            if not datadir.may_be_spared(error):
                raise
            return None

    def _create_in(
        self, datadirs: Iterable[Datadir], name: str, mode: int, owner: Owner
    ) -> tuple[Datadir, int, os.stat_result]:
        """A new file in the first datadir that takes it, and its fstat(2) as it was created.

        Where none does: the error of one that is broken, if any, else StorageFull.
        """
        broken: OSError | None = None
        for datadir in datadirs:
            self._settle_elsewhere(name, datadir)
            try:
                return datadir, *datadir.obtain(
                    lambda made, datadir=datadir: _unmake_file(datadir, name, made[0]),  # type: ignore[misc]
                    _create_file, datadir, name, mode, owner,
                )  # fmt: skip
            except FileExistsError:
                raise ImageExists(f"image {name!r} exists") from None
            except OSError as error:
                if error.errno not in _PASSED_OVER | LOST_ERRNOS or isinstance(error, AnsweredTooLate):
                    raise
                if error.errno in LOST_ERRNOS and not datadir.is_lost(error):
                    broken = error
                log.warning("datadir %s is passed over for %r: %s", datadir.path, name, error.strerror)
        raise broken or StorageFull(f"no datadir has room for {name!r}")

    def replace_file(self, image: Image, transit: Transit, follow: Callable[[], None]) -> None:
        """An image goes on in a copy of its file, in another datadir; all its handles go with it.

        `follow` is called right before, to do to the copy what was done to the file's owner and mode meanwhile.
        After a crash at any point one of the two files has the name. Raises OSError where nothing was changed.
        """
        with _duplicate(image.open_for_write()) as old_fd, self._named(image), contextlib.ExitStack() as undo:
            name, old, key = image.name, image.datadir, image.key
            if name is None or not self._is_at(image, name):
                raise ImageNotFound(f"{name!r} is another file by now")
            if any(datadir.has_any(name) for datadir in self.online() if datadir is not old):
                raise ImageExists(f"{name!r} is in more than one datadir")
            self._settle_elsewhere(name, transit.datadir)
            # Known by both files, so that whoever finds either finds the image; no number is used again meanwhile.
            transit.datadir.take_over(transit.ino, old.identity(key[1]))
            new_key = key_of(os.fstat(transit.fd))
            self._know_as(image, new_key)
            undo.callback(self._know_no_more, new_key)
            transit.announce(name, old, old.finish(inode_of, old_fd))
            undo.callback(transit.forget_note)
            transit.arrive(name)
            undo.callback(transit.withdraw, name)
            if not self._is_at(image, name):  # all that was made durable took its time
                raise ImageNotFound(f"{name!r} is another file by now")
            follow()
            image.move_to(transit.datadir, transit.fd)
            undo.callback(image.move_to, old, old_fd)
            self._moves += 1
            old.unlink(name)
            undo.pop_all()
            self._noted(old, name)
            self._noted(transit.datadir, name)
            self._know_no_more(key)
            _settle(transit, old, key[1])

    def _know_as(self, image: Image, key: Key) -> None:
        with self._table_lock:
            self._live[key] = image

    def _know_no_more(self, key: Key) -> None:
        with self._table_lock:
            del self._live[key]

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
        with contextlib.ExitStack() as stack:
            unchanging: Image | None = None
            while (target := self._renamed(old, new, may_replace, unchanging)) is not None:
                stack.close()
                unchanging = target
                stack.callback(self.let_go, unchanging)
                stack.enter_context(unchanging.change_lock)

    def _renamed(
        self, old: str, new: str, may_replace: Callable[[Image], None], unchanging: Image | None
    ) -> Image | None:
        """None once it is done. Else the image, referenced, that would give way to one in another datadir: it must be
        `unchanging`, for which the caller holds its change lock."""
        with self._names.held(old, new), self.image(old) as image:
            image.datadir.require_writable()
            if old == new:
                return None
            self._require_single(old, new)
            with contextlib.ExitStack() as stack:
                target = None
                with contextlib.suppress(ImageNotFound):
                    target = stack.enter_context(self.image(new))
                if target is image:
                    return None  # two names of one inode: rename(2) does nothing
                if target is not None:
                    may_replace(target)
                    if target.datadir is not image.datadir and target is not unchanging:
                        return self.hold(target)
                self._rename(image, old, new, target)
        return None

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

    def sync(self) -> None:
        """Put on stable storage which names there are. Raises DatadirOffline where that can't be had."""
        for datadir in self.datadirs:
            if datadir.offline is not None and datadir.is_unsettled():
                datadir.require_online()
        for datadir in self.online():
            if datadir.writable:
                datadir.sync()

    def _rename(self, image: Image, old: str, new: str, target: Image | None) -> None:
        here = target is not None and target.datadir is image.datadir
        if self._is_taken(new, but=(target.datadir if target else None,)):
            self._refuse_taken(new)
        if target is not None:
            # What replaces an image must be on stable storage before that is gone.
            image.sync()
        self._settle_elsewhere(new, image.datadir)
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

    def _settle_elsewhere(self, name: str, datadir: Datadir) -> None:
        """Before a name appears in a datadir: an image that had it elsewhere must not come back by a power cut."""
        for other in self.datadirs:
            if other is not datadir:
                other.settle(name)

    def _replace_elsewhere(self, image: Image, old: str, new: str, target: Image) -> None:
        """Two directories can't change in one step: a note on stable storage says which copy gives way.

        Called under the change lock of `target`: after a crash, what was changed since the note counts as used on its
        own, and is kept.

        Where the new copy can't be made durable, or the old one can't be removed, nothing has changed.
        """
        with contextlib.ExitStack() as undo:
            old_inode, new_inode = inode_of(target.path_fd), inode_of(image.path_fd)
            note = target.datadir.note_replaced(new, target.datadir, old_inode, image.datadir, new_inode)
            undo.callback(target.datadir.forget_replaced, note)
            image.datadir.rename(old, new)
            undo.callback(self._rename_back, image.datadir, new, old)
            image.datadir.sync()
            target.datadir.unlink(new)
            undo.pop_all()
        self._noted(target.datadir, new)
        self._forget(target, new)
        try:
            target.datadir.sync()
            target.datadir.forget_replaced(note)
        except OSError as error:
            log.warning("the replacement of image %r is to be completed at the next start: %s", new, error.strerror)

    def _rename_back(self, datadir: Datadir, new: str, old: str) -> None:
        """Undo a rename; where that can't be, the new name lies in two datadirs, and that is told."""
        self.copies.suspect([new])
        if not datadir.has_any(old):
            datadir.rename(new, old)

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

    def finish_replacements(self) -> None:
        """Complete the replacements that a crash cut short: the old copy goes if the new one has its name.

        What an earlier daemon did is made durable first: its end may have left it in the caches of the system.
        """
        for datadir in self.online():
            _sync_if_possible(datadir)
        for datadir in self.online():
            for note in datadir.notes_of_replaced():
                with self._names.held(note.name):
                    if datadir.has_note(note):  # not of what was just under way
                        self._finish_replacement(datadir, note)

    def _finish_replacement(self, holder: Datadir, note: Replaced) -> None:
        """Do what a note asks for; take it away, unless it may still be done later."""
        try:
            old, new = self._askable(note.old_in), self._askable(note.new_in)
            if new and not _has(new, note.name, lambda found: found.is_same(note.new)):
                pass  # it never got the name, or that is another file by now
            elif old and not _has(old, note.name, lambda found: found.is_unchanged(note.old)):
                pass  # it is gone, or has been used on its own; then both are kept
            elif old and new and old.writable and not self._is_live(old, note.name):
                _give_way(old, new, note)
            else:
                log.warning("the replacement of image %r is to be completed later: one of its copies is not at hand",
                            note.name)  # fmt: skip
                return
            holder.forget_replaced(note)
        except OSError as error:
            log.warning("the replacement of image %r can't be completed: %s", note.name, error.strerror)

    def _askable(self, called: str) -> Datadir | None:
        """The datadir that a note calls so; None where it can't be asked now, or is none of this store any more."""
        return next((datadir for datadir in self.online() if called in (datadir.marked_as, datadir.path)), None)

    def _is_live(self, datadir: Datadir, name: str) -> bool:
        status = datadir.find(name)
        with self._table_lock:
            return status is not None and key_of(status) in self._live


def _may_exist(name: str) -> bool:
    """Whether an image can have this name. Raises InvalidName for what is no name."""
    try:
        names.check(name)
    except ReservedName:
        return False
    return True


def _has(datadir: Datadir, name: str, is_meant: Callable[[Inode], bool]) -> bool:
    """Whether a name leads to a file that is meant."""
    found = datadir.inode(name)
    return found is not None and is_meant(found)


def _give_way(old: Datadir, new: Datadir, note: Replaced) -> None:
    """Remove the old copy of an image, the new one being there."""
    log.warning("the replacement of image %r was cut short; it is completed with that in %s", note.name, new.path)
    new.sync()  # what a hung disk or a killed daemon cut short may be in caches only
    links = old.status(note.name).st_nlink
    old.unlink(note.name)
    if links == 1:
        old.xattrs.forget(note.old.number)
    old.sync()


def _entries(datadir: Datadir) -> Iterator[Entry]:
    """The images of a datadir, none more once it turns out to be lost."""
    try:
        yield from datadir.entries()
    except OSError as error:
        if not datadir.is_lost(error):
            raise


def _sync_if_possible(datadir: Datadir) -> None:
    if datadir.writable:
        try:
            datadir.sync()
        except OSError as error:
            log.warning("datadir %s can't be synced: %s", datadir.path, error.strerror)


def _create_file(datadir: Datadir, name: str, mode: int, owner: Owner) -> tuple[int, os.stat_result]:
    """A new file with exactly this mode, and this owner where the process may give files away."""
    given_away = owner.uid not in (-1, os.geteuid()) or owner.gid not in (-1, os.getegid())
    # Until it has its owner, nobody else may open it.
    fd = datadir.create(name, 0o600 if given_away else mode)
    try:
        status = os.fstat(fd)
        datadir.xattrs.forget(status.st_ino)  # of an earlier inode of this number
        group_given = owner.by_default and status.st_gid != os.getegid()
        give(fd, status, mode, Owner(owner.uid) if group_given else owner)
    except BaseException:
        _unmake_file(datadir, name, fd)
        raise
    return fd, status


def _unmake_file(datadir: Datadir, name: str, fd: int) -> None:
    os.close(fd)
    datadir.unlink(name)


def _settle(transit: Transit, old: Datadir, old_ino: int) -> None:
    """The old file is gone: put that on stable storage, and take the note away."""
    try:
        old.xattrs.forget(old_ino)
        old.sync()
        transit.forget_note()
    except OSError as error:
        log.warning("a relocation from %s is to be completed at the next start: %s", old.path, error.strerror)


@contextlib.contextmanager
def _duplicate(fd: int) -> Iterator[int]:
    """Another descriptor of an open file, while inside."""
    duplicate = os.dup(fd)
    try:
        yield duplicate
    finally:
        os.close(duplicate)


def give(fd: int, status: os.stat_result, mode: int, owner: Owner) -> None:
    """Give an open file exactly this mode, and this owner where the process may; `status` is its fstat(2)."""
    strange = owner.uid not in (-1, status.st_uid) or owner.gid not in (-1, status.st_gid)
    if strange:
        try:
            os.fchown(fd, owner.uid, owner.gid)
        except PermissionError:
            log.debug("a new image can't be given to %s; it stays with the daemon", owner)
            mode &= ~(stat.S_ISUID | stat.S_ISGID)  # they would act for the daemon
    if strange or mode != stat.S_IMODE(status.st_mode):
        os.fchmod(fd, mode)
