#!/bin/sh
# Offers a driver VERSION in this host's own repository: empty packages with the names of NVIDIA's, and a signed index.
set -eu
version=$1
export GNUPGHOME=/srv/key
mkdir -p /srv/repository
if [ ! -d "$GNUPGHOME" ]; then
    mkdir -m 0700 "$GNUPGHOME"
    gpg --batch --quiet --passphrase '' --quick-generate-key 'Fleetfit tests <tests@fleetfit.invalid>' rsa3072 sign never
fi
folder=$(mktemp -d)
for name in libnvidia-ml1 libcuda1 nvidia-driver-cuda nvidia-kernel-open-dkms; do
    mkdir -p "$folder/$name/DEBIAN"
    printf 'Package: %s\nVersion: %s-1\nArchitecture: amd64\nMaintainer: NVIDIA <tests@fleetfit.invalid>\n' \
        "$name" "$version" > "$folder/$name/DEBIAN/control"
    if [ "$name" = nvidia-driver-cuda ]; then
        printf 'Depends: libnvidia-ml1 (= %s-1), libcuda1 (= %s-1)\n' "$version" "$version" >> "$folder/$name/DEBIAN/control"
    fi
    printf 'Description: empty, for a test\n' >> "$folder/$name/DEBIAN/control"
    dpkg-deb --root-owner-group --build "$folder/$name" "/srv/repository/${name}_${version}-1_amd64.deb" > /dev/null
done
rm -rf "$folder"
cd /srv/repository
: > Packages
for file in *.deb; do
    dpkg-deb --field "$file" >> Packages
    printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$file" "$(stat -c %s "$file")" "$(sha256sum "$file" | cut -d' ' -f1)" \
        >> Packages
done
printf 'Origin: NVIDIA\nLabel: NVIDIA CUDA\nDate: %s\nSHA256:\n %s %s Packages\n' "$(date -Ru)" \
    "$(sha256sum Packages | cut -d' ' -f1)" "$(stat -c %s Packages)" > Release
rm -f InRelease
gpg --batch --quiet --clearsign --output InRelease Release
gpg --batch --armor --export > /srv/repository/key.asc
gpg --batch --with-colons --fingerprint | awk -F: '/^fpr/ {print $10; exit}' > /srv/repository/key.fingerprint
chmod -R a+rX /srv/repository
